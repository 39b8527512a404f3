"""Gemma 2 and the text models of Gemma 3: `model_type: gemma2`, `gemma3_text`, `gemma3`."""

from __future__ import annotations

import dataclasses
import json
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
    "max_position_embeddings": 8192,
}
_GEMMA3_SIZES = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
# of a config.json around text_config, what says something of images alone
_IMAGES = frozenset(
    f"{name}_{end}" for name in ("boi", "eoi", "image") for end in ("token_index", "token_id")
) | {"text_config", "vision_config", "mm_tokens_per_image"}
_GELU = ("gelu_pytorch_tanh",)
_ONLY = {
    "hidden_activation": _GELU,
    "hidden_act": _GELU,
}


def read_gemma2(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of a Gemma 2: every other layer sees a window, scores and logits are capped."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    # a second name of the window, which transformers never reads, in some releases
    only = _ONLY | {"sliding_window_size": (raw.get("sliding_window"), None)}
    fields = Fields(raw, where, defaults=_DEFAULTS | caps, only=only)
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
    defaults = _DEFAULTS | {"sliding_window_pattern": 6, "max_position_embeddings": 131072}
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


def read_gemma3_images(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of the text model of a Gemma 3 that sees images (4B and larger), without that part.

    What is exported is a gemma3_text. Releases leave out of text_config what transformers' own
    class has as default, sizes too.
    """
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"{where}: text_config is {json.dumps(text)}, expected an object")
    around = {k: v for k, v in raw.items() if k not in _IMAGES and v is not None}
    names = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    ends = {k: around[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in around}
    spec = read_gemma3(_GEMMA3_SIZES | around | text | ends | names, where)
    return dataclasses.replace(spec, images=True)


def _type(sliding: bool) -> str:
    return "sliding_attention" if sliding else "full_attention"


def _read_ropes(fields: Fields) -> tuple[Rope, Rope]:
    """(of the global layers, of the local ones): rope_scaling is of the global ones alone."""
    thetas = fields.number("rope_theta", 1e6), fields.number("rope_local_base_freq", 1e4)
    scaling = fields.typed("rope_scaling", dict, {})
    raw = fields.typed("rope_parameters", dict, {"full_attention": scaling})
    names = ("full_attention", "sliding_attention")
    if other := sorted(set(raw) - set(names)):
        fields.note(f"rope_parameters has {other}, expected {list(names)}")
    everywhere, local = (
        rope_of(fields, raw.get(name) or {}, theta)
        for name, theta in zip(names, thetas, strict=True)
    )
    return everywhere, local


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
        attention_scale=(fields.number("query_pre_attn_scalar") or 256.0) ** -0.5,
        final_softcap=fields.number("final_logit_softcapping"),
        **switches,
    )
