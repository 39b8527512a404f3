"""Qwen3-MoE (30B-A3B, 235B-A22B): config.json of `model_type: qwen3_moe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.models.config_json import Fields, read_dense, read_pattern
from posttrain.models.spec import LayerKind, Spec

_DEFAULTS = {
    "num_key_value_heads": 4,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}


def read_spec(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of a Qwen3-MoE: a Qwen3 whose layers are mixtures, every decoder_sparse_step-th, but
    for those in mlp_only_layers. norm_topk_prob says whether the chosen p's are normalised."""
    only = {"output_router_logits": (True, False, None)}
    fields = Fields(raw, where, defaults=_DEFAULTS, only=only)
    fields.take("router_aux_loss_coef", None)  # in training: train.router_balance
    fields.take("max_window_layers", None)  # transformers gives all layers the window
    layers, dense = fields.size("num_hidden_layers"), fields.typed("mlp_only_layers", list, [])
    step = fields.size("decoder_sparse_step", 1)
    # what transformers 5 writes, and what files had before
    experts = fields.size("num_local_experts", fields.size("num_experts", 128))
    window = fields.size_or_none("sliding_window")
    if not fields.flag("use_sliding_window"):
        window = None
    name = "full_attention" if window is None else "sliding_attention"
    kinds = read_pattern(
        fields, [name] * layers, sliding=LayerKind(window=window), full=LayerKind(window=window)
    )
    pattern = tuple(
        LayerKind(window=kind.window, experts=experts)
        if i not in dense and (i + 1) % step == 0
        else kind
        for i, kind in enumerate(kinds)
    )
    return read_dense(
        fields,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="head",
        pattern=pattern,
        experts_chosen=fields.size("num_experts_per_tok"),
        experts_normalised=fields.flag("norm_topk_prob"),
        expert_mlp=fields.size("moe_intermediate_size"),
    )
