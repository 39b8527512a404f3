"""Fields that a config.json leaves out stand for what they stand for in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.models import MODELS, read_spec

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"gemma3"}))
def test_defaults_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig

    sizes = {"num_hidden_layers": 31, "vocab_size": 100, "hidden_size": 4096}
    raw = {"model_type": name, **sizes, "intermediate_size": 96, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs, ours = AutoConfig.from_pretrained(tmp_path), read_spec(tmp_path)
    rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    heads = theirs.num_key_value_heads or theirs.num_attention_heads
    assert ours.kv_heads == heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 4096 // 32)
    assert ours.rms_eps == theirs.rms_norm_eps
    assert (ours.rope.kind, ours.rope.theta) == ("default", rope["rope_theta"])
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.init_std == theirs.initializer_range
    assert ours.out_bias == getattr(theirs, "attention_bias", False)
    assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.final_softcap == getattr(theirs, "final_logit_softcapping", None)
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None)
    windows = [
        window if types is None or "sliding" in kind else None for kind in types or [""] * 31
    ]
    assert [kind.window for kind in ours.kinds] == windows
    if name == "gemma3_text":
        local = theirs.rope_parameters["sliding_attention"]["rope_theta"]
        assert ours.kinds[0].rope is not None
        assert ours.kinds[0].rope.theta == local
    experts = getattr(theirs, "num_local_experts", getattr(theirs, "num_experts", 0))
    assert {kind.experts for kind in ours.kinds} == {experts}
    assert ours.experts_chosen == getattr(theirs, "num_experts_per_tok", 0)
