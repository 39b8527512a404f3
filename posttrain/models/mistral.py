"""Mistral 7B and its kin (dense text models): config.json of `model_type: mistral`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.models.config_json import Fields, read_dense, same_kind
from posttrain.models.spec import LayerKind, Spec

_DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}


def read_spec(raw: Mapping[str, Any], where: str) -> Spec:
    """Spec of a Mistral: a Llama whose layers all see a sliding window (null: everything)."""
    fields = Fields(raw, where, defaults=_DEFAULTS)
    kind = LayerKind(window=fields.size_or_none("sliding_window"))
    return read_dense(fields, pattern=same_kind(fields, kind))
