"""Mistral 7B and its kin (dense text models): config.json of `model_type: mistral`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.models.config_json import Fields, read_dense, read_pattern
from posttrain.models.spec import LayerKind, Spec


def read_spec(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of a Mistral: a Llama whose layers all see a sliding window (null: everything)."""
    fields = Fields(raw, where, defaults={"num_key_value_heads": 8, "sliding_window": 4096})
    window = fields.size_or_none("sliding_window")
    kind = LayerKind(window=window)
    name = "full_attention" if window is None else "sliding_attention"
    types = [name] * fields.size("num_hidden_layers")
    pattern = read_pattern(fields, types, sliding=kind, full=LayerKind())
    if set(pattern) != {kind}:
        raise ValueError(f"{where}: layer_types mixes kinds of attention, which no Mistral does")
    return read_dense(fields, pattern=(kind,))
