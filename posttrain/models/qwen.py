"""Qwen2, Qwen2.5 and Qwen3 (dense): config.json of `model_type: qwen2` and `qwen3`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.models.config_json import Fields, read_dense, read_pattern
from posttrain.models.spec import LayerKind, Spec

_DEFAULTS = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}


def read_windows(fields: Fields) -> tuple[LayerKind, ...]:
    """With use_sliding_window the layers from max_window_layers on see a window alone."""
    window, layers = fields.size_or_none("sliding_window"), fields.size("num_hidden_layers")
    before = fields.size("max_window_layers", 28, least=0)
    if not fields.flag("use_sliding_window"):
        window = None
    sliding = 0 if window is None else max(layers - before, 0)
    types = ["full_attention"] * (layers - sliding) + ["sliding_attention"] * sliding
    return read_pattern(fields, types, sliding=LayerKind(window=window), full=LayerKind())


def read_qwen2(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of a Qwen2 or 2.5: q, k and v always have biases, o never."""
    fields = Fields(raw, where, defaults=_DEFAULTS)
    return read_dense(fields, qkv_bias=True, pattern=read_windows(fields))


def read_qwen3(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of a Qwen3: q and k are normalised per head before RoPE; head_dim is its own field."""
    fields = Fields(raw, where, defaults=_DEFAULTS | {"head_dim": 128})
    return read_dense(
        fields,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="head",
        pattern=read_windows(fields),
    )
