"""Qwen2, Qwen2.5 and Qwen3 (dense): config.json of `model_type: qwen2` and `qwen3`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.models.spec import Spec, read_dense


def read_qwen2(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of a Qwen2 or 2.5: q, k and v always have biases, o never."""
    return read_dense(raw, where, kv_heads_default=32, qkv_bias=True)


def read_qwen3(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of a Qwen3: q and k are normalised per head before RoPE; head_dim is its own field."""
    return read_dense(
        {"head_dim": 128, **raw},
        where,
        kv_heads_default=32,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm=True,
    )
