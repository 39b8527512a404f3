"""OLMo-2 (dense text models): config.json of `model_type: olmo2`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.models.config_json import Fields, read_dense
from posttrain.models.spec import Spec

_NAMES = {
    "layers/attention_post_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers/mlp_post_norm": "model.layers.{layer}.post_feedforward_layernorm.weight",
}


def read_spec(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of an OLMo-2: norms after attention and MLP, none before; q and k normalised whole."""
    return read_dense(
        Fields(raw, where, defaults={"rms_norm_eps": 1e-5}),
        tensors=_NAMES,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="width",
        pre_norm=False,
        post_norm=True,
    )
