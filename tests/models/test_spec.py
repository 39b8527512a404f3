"""config.json -> Spec: what is understood, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.models import read_spec
from posttrain.models.layers import rope_frequencies
from posttrain.models.spec import ModelConfig, Rope, Spec
from tests.models.tiny import CONFIGS, write_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def spec_of(folder: Path, name: str = "llama", **changes: Any) -> Spec:
    return read_spec(write_config(folder, name, **changes))


def test_families_differ_in_biases_and_norms(tmp_path: Path) -> None:
    llama, qwen2, qwen3 = (spec_of(tmp_path, name) for name in CONFIGS)
    assert (llama.qkv_bias, llama.out_bias, llama.qk_norm, llama.tied) == (False,) * 4
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.qk_norm, qwen2.tied) == (True, False, False, True)
    assert (qwen3.qkv_bias, qwen3.out_bias, qwen3.qk_norm, qwen3.tied) == (False, False, True, True)
    assert (llama.head_dim, qwen3.head_dim) == (16, 24)
    biased = spec_of(tmp_path, attention_bias=True, mlp_bias=True)
    assert (biased.qkv_bias, biased.out_bias, biased.mlp_bias) == (True,) * 3


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"rope_theta": 5e5}, Rope(theta=5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, Rope(theta=5e5)),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            Rope(theta=1e4, kind="linear", factor=2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
            Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_rope_is_read_in_both_layouts(tmp_path: Path, fields: dict[str, Any], want: Rope) -> None:
    assert spec_of(tmp_path, **fields).rope == want


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, r'hidden_act = "gelu": only "silu"'),
        ("llama", {"logit_scale": 0.5}, "logit_scale = 0.5: unknown here"),
        ("llama", {"embedding_multiplier": False}, "embedding_multiplier = false: unknown here"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = true: only false"),
        ("qwen3", {"attention_dropout": 0.1}, "attention_dropout = 0.1: only 0"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "RoPE type 'yarn'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 4}}, "low_freq_factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}}, "mscale"),
        ("llama", {"num_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
        ("llama", {"hidden_size": "64"}, "hidden_size is '64', expected a whole number"),
        ("llama", {"hidden_size": None}, "'hidden_size' is missing"),
        ("llama", {"model_type": "mamba"}, "'mamba' is not known .*llama, qwen2, qwen3"),
    ],
)
def test_what_would_change_the_maths_is_refused_by_name(
    tmp_path: Path, name: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named) as error:
        spec_of(tmp_path, name, **fields)
    assert "config.json" in str(error.value)


def test_all_refused_fields_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)hidden_act.*one_field.*other_field"):
        spec_of(tmp_path, one_field=1, hidden_act="relu", other_field={"a": 1})


def test_fields_without_meaning_here_are_read_over(tmp_path: Path) -> None:
    plain = spec_of(tmp_path, "qwen2")
    assert plain == spec_of(
        tmp_path, "qwen2", sliding_window=4096, use_sliding_window=False, max_window_layers=1,
        torch_dtype="bfloat16", unknown_but_null=None, layer_types=["full_attention"] * 2,
    )  # fmt: skip


def test_unreadable_config_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json: not found"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not JSON"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"config.json: expected a JSON object, found list"):
        read_spec(tmp_path)


def test_llama3_frequencies() -> None:
    """The three regimes of the Llama 3.1 release, worked out pair by pair."""
    rope, head_dim = Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192), 128
    found = rope_frequencies(rope, head_dim)
    kept = slowed = between = 0
    for i, got in enumerate(found):
        plain = 5e5 ** (-2 * i / head_dim)
        wavelength = 2 * np.pi / plain
        if wavelength < 8192 / 4:
            want, kept = plain, kept + 1
        elif wavelength > 8192:
            want, slowed = plain / 8, slowed + 1
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want, between = (1 - smooth) * plain / 8 + smooth * plain, between + 1
        assert got == pytest.approx(want, rel=2e-6), i
    assert min(kept, slowed, between) > 3


def test_parameters_are_counted(tmp_path: Path) -> None:
    """By hand: 2 layers of 64 wide, 4 heads and 2 KV heads of 16, ffn 96, 160 tokens, untied."""
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert spec_of(tmp_path).parameters == 2 * layer + 2 * 160 * 64 + 64
    padded = spec_of(tmp_path).with_vocab(161, 128)
    assert (padded.vocab_size, padded.vocab_rows) == (161, 256)


def test_an_empty_token_is_no_token() -> None:
    with pytest.raises(ValueError, match="at least 1 character"):
        ModelConfig(path="x", new_tokens=("<a>", ""))
