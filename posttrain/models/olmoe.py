"""OLMoE 1B-7B: config.json of `model_type: olmoe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.models.config_json import Fields, read_dense
from posttrain.models.spec import LayerKind, Spec

_DEFAULTS = {
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}


def read_spec(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of an OLMoE: a mixture in every layer; q and k are normalised over all heads."""
    only = {"output_router_logits": (True, False, None), "clip_qkv": (None,)}
    fields = Fields(raw, where, defaults=_DEFAULTS, only=only)
    fields.take("router_aux_loss_coef", None)  # in training: train.router_balance
    return read_dense(
        fields,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="width",
        pattern=(LayerKind(experts=fields.size("num_experts")),),
        experts_chosen=fields.size("num_experts_per_tok"),
        experts_normalised=fields.flag("norm_topk_prob"),
        expert_mlp=fields.size("intermediate_size"),
    )
