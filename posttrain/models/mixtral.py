"""Mixtral 8x7B, 8x22B and their kin: config.json of `model_type: mixtral`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.models.config_json import Fields, read_dense, read_pattern
from posttrain.models.spec import LayerKind, Spec

_DEFAULTS = {
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 131072,
}
_MOE = "model.layers.{layer}.block_sparse_moe."
_TENSORS = {
    "layers/moe/router": _MOE + "gate.weight",
    "layers/moe/gate": _MOE + "experts.{expert}.w1.weight",
    "layers/moe/up": _MOE + "experts.{expert}.w3.weight",
    "layers/moe/down": _MOE + "experts.{expert}.w2.weight",
}


def read_spec(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of a Mixtral: a Mistral with a mixture in every layer, the chosen p's normalised."""
    only = {"router_jitter_noise": (0, None), "output_router_logits": (True, False, None)}
    fields = Fields(raw, where, defaults=_DEFAULTS, only=only)
    fields.take("router_aux_loss_coef", None)  # in training: train.router_balance
    window = fields.size_or_none("sliding_window")
    kind = LayerKind(window=window, experts=fields.size("num_local_experts"))
    name = "full_attention" if window is None else "sliding_attention"
    types = [name] * fields.size("num_hidden_layers")
    return read_dense(
        fields,
        pattern=read_pattern(fields, types, sliding=kind, full=kind)[:1],
        experts_chosen=fields.size("num_experts_per_tok"),
        experts_normalised=True,
        expert_mlp=fields.size("intermediate_size"),
        tensors=_TENSORS,
    )
