"""Gemma 2 and the text models of Gemma 3: config.json of `model_type: gemma2`, `gemma3_text`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from posttrain.models.config_json import Fields, read_dense, read_pattern, rope_of
from posttrain.models.spec import LayerKind, Rope, Spec

_NAMES = {
    "layers/attention_post_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers/mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm": "model.layers.{layer}.post_feedforward_layernorm.weight",
}
_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GELU = ("gelu_pytorch_tanh",)
_ONLY = {
    "hidden_activation": _GELU,
    "hidden_act": _GELU,
    "use_bidirectional_attention": (False, None),
}


def read_gemma2(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of a Gemma 2: every other layer sees a window, scores and logits are capped."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    fields = Fields(raw, where, defaults=_DEFAULTS | caps, only=_ONLY)
    types = [_type(i % 2 == 0) for i in range(fields.size("num_hidden_layers"))]
    sliding = LayerKind(window=fields.size("sliding_window"))
    return _read(
        fields,
        pattern=read_pattern(fields, types, sliding=sliding, full=LayerKind()),
        attention_softcap=fields.number("attn_logit_softcapping"),
    )


def read_gemma3(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of a Gemma 3 text model: local layers with a RoPE of their own, then a global one.

    q and k are normalised per head. transformers computes no cap on the scores, whatever
    attn_logit_softcapping says: it is refused.
    """
    defaults = _DEFAULTS | {"sliding_window_pattern": 6}
    fields = Fields(raw, where, defaults=defaults, only=_ONLY | {"attn_logit_softcapping": ()})
    period = fields.size("sliding_window_pattern")
    period = fields.size("_sliding_window_pattern", period)  # as some releases spell it
    types = [_type((i + 1) % period != 0) for i in range(fields.size("num_hidden_layers"))]
    everywhere, local = _read_ropes(fields)
    sliding = LayerKind(window=fields.size("sliding_window"), rope=local)
    return _read(
        fields,
        pattern=read_pattern(fields, types, sliding=sliding, full=LayerKind()),
        rope=everywhere,
        qk_norm="head",
    )


def _type(sliding: bool) -> str:
    return "sliding_attention" if sliding else "full_attention"


def _read_ropes(fields: Fields) -> tuple[Rope, Rope]:
    """(of the global layers, of the local ones): rope_scaling is of the global ones alone."""
    theta = fields.take("rope_theta", 1e6)
    local_theta = fields.take("rope_local_base_freq", 1e4)
    scaling = fields.take("rope_scaling", {})
    raw = fields.take("rope_parameters", {"full_attention": scaling})
    names = ("full_attention", "sliding_attention")
    if other := sorted(set(raw) - set(names)):
        raise ValueError(f"{fields.where}: rope_parameters has {other}, expected {list(names)}")
    one, other = (raw.get(name) or {} for name in names)
    return rope_of(one, theta, fields.where), rope_of(other, local_theta, fields.where)


def _read(fields: Fields, **switches: Any) -> Spec:
    return read_dense(
        fields,
        tensors=_NAMES,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        post_norm=True,
        norm_offset=1.0,
        activation="gelu_tanh",
        embed_scale=math.sqrt(fields.size("hidden_size")),
        attention_scale=float(fields.take("query_pre_attn_scalar")) ** -0.5,
        final_softcap=fields.number("final_logit_softcapping"),
        **switches,
    )
