"""Phi-3 and Phi-3.5 (dense text models): config.json of `model_type: phi3`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.models.config_json import Fields, read_dense, same_kind
from posttrain.models.spec import LayerKind, Spec

_FUSED = {
    "layers/attention/q": "model.layers.{layer}.self_attn.qkv_proj.weight",
    "layers/attention/k": "model.layers.{layer}.self_attn.qkv_proj.weight",
    "layers/attention/v": "model.layers.{layer}.self_attn.qkv_proj.weight",
    "layers/mlp/gate": "model.layers.{layer}.mlp.gate_up_proj.weight",
    "layers/mlp/up": "model.layers.{layer}.mlp.gate_up_proj.weight",
}


def read_spec(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of a Phi-3: a Llama with a window, whose files hold q, k, v and gate, up as one each.

    The long-context models (RoPE of type longrope, whose frequencies depend on a row's length) are
    refused by read_rope.
    """
    fields = Fields(
        raw,
        where,
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        only={"resid_pdrop": (0, None), "embd_pdrop": (0, None)},
    )
    fields.take("original_max_position_embeddings", None)  # says something with longrope alone
    kind = LayerKind(window=fields.size_or_none("sliding_window"))
    return read_dense(fields, tensors=_FUSED, pattern=same_kind(fields, kind))
