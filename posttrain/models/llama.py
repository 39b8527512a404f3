"""Llama 2, 3 and 3.x (dense text models): config.json of `model_type: llama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.models.config_json import Fields, read_dense
from posttrain.models.spec import Spec


def read_spec(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of a Llama. attention_bias puts biases on q, k, v and o; mlp_bias on all three."""
    return read_dense(
        Fields(raw, where),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
    )
