"""config.json -> Spec: what is understood, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.models import read_spec
from posttrain.models.layers import rope_frequencies
from posttrain.models.spec import LayerKind, ModelConfig, Rope, Spec
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
    llama, qwen2, qwen3 = (spec_of(tmp_path, name) for name in ("llama", "qwen2", "qwen3"))
    assert (llama.qkv_bias, llama.out_bias, llama.qk_norm, llama.tied) == (False, False, "", False)
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.qk_norm, qwen2.tied) == (True, False, "", True)
    assert (qwen3.qkv_bias, qwen3.out_bias, qwen3.qk_norm) == (False, False, "head")
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
        ("llama", {"sliding_window": 64}, "sliding_window = 64: unknown here"),
        ("qwen3", {"attention_dropout": 0.1}, "attention_dropout = 0.1: only 0"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "no sliding_window"),
        ("qwen3", {"layer_types": ["full_attention"]}, "names 1 layers of 2"),
        ("gemma2", {"layer_types": ["full_attention", "chunked"]}, "layer_types has chunked"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true"),
        ("gemma2", {"final_logit_softcapping": -1}, "final_logit_softcapping is -1"),
        ("gemma2", {"hidden_activation": "gelu"}, 'only "gelu_pytorch_tanh" is supported'),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, r"has \['rope_type'\]"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0, expected a whole number"),
        (
            "mistral",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "types are not all sliding_attention",
        ),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "'longrope'"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop = 0.1: only 0"),
        ("phi3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: only 1"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv = 8.0: unknown here"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "RoPE type 'yarn'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 4}}, "low_freq_factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}}, "mscale"),
        ("llama", {"num_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
        ("llama", {"hidden_size": "64"}, r'hidden_size is "64", expected a whole number'),
        ("llama", {"hidden_size": None}, "'hidden_size' is missing"),
        ("llama", {"model_type": "mamba"}, "'mamba' is not known .*gemma2, .*llama, .*qwen3"),
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
    gemma = spec_of(tmp_path, "gemma3_text")
    layer = 64 * 4 * 24 * 2 + 64 * 2 * 24 * 2 + 3 * 64 * 96 + 4 * 64 + 2 * 24
    assert gemma.parameters == 5 * layer + 160 * 64 + 64
    olmo = spec_of(tmp_path, "olmo2")
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64 + 64 + 32
    assert olmo.parameters == 2 * layer + 2 * 160 * 64 + 64
    padded = spec_of(tmp_path).with_vocab(161, 128)
    assert (padded.vocab_size, padded.vocab_rows) == (161, 256)


LOCAL, GLOBAL = LayerKind(window=4), LayerKind()


@pytest.mark.parametrize(
    ("kinds", "groups"),
    [
        # all alike: one stack
        ([GLOBAL] * 3, [[range(3)]]),
        # five local and a global one, twice, and two local ones
        (
            ([LOCAL] * 5 + [GLOBAL]) * 2 + [LOCAL] * 2,
            [[range(i, 12, 6) for i in range(6)], [range(12, 14)]],
        ),
        ([LOCAL, GLOBAL] * 2 + [LOCAL], [[range(0, 4, 2), range(1, 4, 2)], [range(4, 5)]]),
        # a prefix of its own
        ([GLOBAL] + [LOCAL] * 3, [[range(1)], [range(1, 4)]]),
        ([GLOBAL, LOCAL], [[range(1)], [range(1, 2)]]),
    ],
)
def test_layers_are_grouped_by_the_period_of_their_kinds(
    tmp_path: Path, kinds: list[LayerKind], groups: list[list[range]]
) -> None:
    spec = dataclasses.replace(spec_of(tmp_path), layers=len(kinds), pattern=tuple(kinds))
    assert [[stack.layers for stack in group] for group in spec.groups] == groups
    names = [stack.name for group in spec.groups for stack in group]
    assert names == list(spec.stacks) == [str(i) for i in range(len(names))]
    assert all(kinds[i] == stack.kind for stack in spec.stacks.values() for i in stack.layers)


def test_windows_and_ropes_of_the_families(tmp_path: Path) -> None:
    def kinds(name: str, **changes: Any) -> list[LayerKind]:
        spec = spec_of(tmp_path, name, **changes)
        return [spec.pattern[i % len(spec.pattern)] for i in range(spec.layers)]

    assert kinds("mistral") == [LayerKind(window=5)] * 2
    assert kinds("mistral", sliding_window=None) == [GLOBAL] * 2
    assert kinds("phi3") == [GLOBAL] * 2
    assert kinds("phi3", sliding_window=7) == [LayerKind(window=7)] * 2
    assert kinds("gemma2", num_hidden_layers=3) == [
        LayerKind(window=5),
        GLOBAL,
        LayerKind(window=5),
    ]
    local = LayerKind(window=5, rope=Rope(100.0))
    assert kinds("gemma3_text") == [local, GLOBAL, local, GLOBAL, local]
    types = ["full_attention", "sliding_attention"]
    assert kinds("gemma3_text", num_hidden_layers=2, layer_types=types) == [GLOBAL, local]
    window = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    assert kinds("qwen2", **window) == [GLOBAL, LayerKind(window=9)]


def test_gemma_3_ropes_in_both_layouts(tmp_path: Path) -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }
    }
    for fields in (old, new):
        spec = spec_of(tmp_path, "gemma3_text", **fields)
        assert spec.rope == Rope(5e5, "linear", 8.0)
        assert spec.pattern[0].rope == Rope(100.0)
    plain = spec_of(tmp_path, "gemma3_text", rope_local_base_freq=None)
    assert (plain.rope, plain.pattern[0].rope) == (Rope(1e6), Rope(1e4))


def test_a_familys_defaults_stand_in_for_absent_fields_and_not_for_null(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in CONFIGS["gemma2"].items() if "softcapping" not in k})
    )
    spec = read_spec(tmp_path)
    assert (spec.attention_softcap, spec.final_softcap) == (50.0, 30.0)
    nulls = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    spec = spec_of(tmp_path, "gemma2", **nulls)
    assert (spec.attention_softcap, spec.final_softcap) == (None, None)
    assert spec.tied
    assert spec.attention_scale == pytest.approx(20**-0.5)
    assert (spec.embed_scale, spec.norm_offset) == (8.0, 1.0)


def test_an_empty_token_is_no_token() -> None:
    with pytest.raises(ValueError, match="at least 1 character"):
        ModelConfig(path="x", new_tokens=("<a>", ""))
