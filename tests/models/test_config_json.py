"""config.json as it is published, and broken in every way: read, or told by file and field."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.models import MODELS, read_spec
from posttrain.models.spec import LayerKind, Rope
from tests.models.released import GEMMA3_4B, GENERIC, RELEASED
from tests.models.tiny import CONFIGS


def write(folder: Path, raw: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", list(RELEASED))
def test_released_models_are_read(tmp_path: Path, name: str) -> None:
    raw, parameters = RELEASED[name]
    spec = read_spec(write(tmp_path, GENERIC | raw))
    assert spec.parameters == pytest.approx(parameters, rel=1e-3)
    assert spec.max_positions == raw["max_position_embeddings"]


def test_what_released_models_have_of_their_own(tmp_path: Path) -> None:
    specs = {name: read_spec(write(tmp_path, raw)) for name, (raw, _) in RELEASED.items()}
    local = LayerKind(window=512, rope=Rope(1e4))
    for name, layers in {"gemma-3-1b": 26, "gemma-3-270m": 18}.items():
        kinds = [specs[name].pattern[i % len(specs[name].pattern)] for i in range(layers)]
        assert kinds == [LayerKind() if i % 6 == 5 else local for i in range(layers)]
        assert specs[name].rope == Rope(1e6)
        assert len(specs[name].stacks) == (7 if layers == 26 else 6)
    assert specs["gemma-2-9b"].pattern[:2] == (LayerKind(window=4096), LayerKind())
    assert specs["Mistral-7B-v0.1"].pattern == (LayerKind(window=4096),)
    assert specs["Mistral-7B-v0.3"].pattern == (LayerKind(),)
    assert specs["Phi-3-mini-4k"].pattern == (LayerKind(window=2047),)
    assert specs["Llama-3.2-1B"].rope == Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192)
    assert {name for name, spec in specs.items() if spec.tied} == {
        *("Llama-3.2-1B", "SmolLM2-135M", "Qwen2.5-0.5B", "Qwen3-0.6B"),
        *("gemma-2-2b", "gemma-2-9b", "gemma-3-1b", "gemma-3-270m"),
    }


def test_of_a_gemma_3_with_images_the_text_model_is_read(tmp_path: Path) -> None:
    """4B as released: text_config leaves out what is the default of transformers' class."""
    raw = GEMMA3_4B
    spec = read_spec(write(tmp_path, raw))
    assert spec.title == "gemma3_text without the part that sees images"
    assert spec.parameters == pytest.approx(3.88e9, rel=1e-3)
    assert (spec.vocab_size, spec.heads, spec.kv_heads, spec.head_dim) == (262208, 8, 4, 256)
    assert spec.rope == Rope(1e6, "linear", 8.0)
    assert [kind.window for kind in spec.kinds] == [None if i % 6 == 5 else 1024 for i in range(34)]
    written = json.loads(spec.config_json)
    assert (written["model_type"], written["eos_token_id"]) == ("gemma3_text", [1, 106])
    assert not {"text_config", "vision_config", "image_token_index"} & set(written)
    again = read_spec(write(tmp_path, written))
    assert again == dataclasses.replace(spec, images=False)

    wrong = raw | {"quantization_config": {"bits": 4}, "text_config": {"sliding_window": 0}}
    with pytest.raises(ValueError, match=r"(?s)sliding_window is 0.*quantization_config = "):
        read_spec(write(tmp_path, wrong))
    with pytest.raises(ValueError, match=r"config.json: text_config is null, expected an object"):
        read_spec(write(tmp_path, raw | {"text_config": None}))


def test_long_context_phis_are_refused_with_all_that_they_need(tmp_path: Path) -> None:
    """Phi-4-mini: longrope over three quarters of each head."""
    longrope = {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
    raw = RELEASED["phi-4"][0] | {"rope_scaling": longrope, "partial_rotary_factor": 0.75}
    with pytest.raises(ValueError, match=r"(?s)'longrope'.*partial_rotary_factor = 0.75: only 1"):
        read_spec(write(tmp_path, raw))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_all_that_is_wrong_is_told_at_once(tmp_path: Path, name: str) -> None:
    wrong = {
        "hidden_size": "64",
        "vocab_size": None,
        "rms_norm_eps": -1,
        "tie_word_embeddings": "false",
        "layer_types": ["chunked_attention"],
        "quantization_config": {"bits": 4},
        "attention_dropout": 0.1,
    }
    rope = {"rope_type": "yarn", "factor": 4.0}
    wrong["rope_parameters"] = {"full_attention": rope} if name == "gemma3_text" else rope
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        read_spec(write(tmp_path, CONFIGS[name] | wrong))
    for field, said in {
        'hidden_size is "64"': "expected a whole number >= 1",
        "field 'vocab_size' is missing": "",
        "rms_norm_eps is -1": "expected a number > 0",
        'tie_word_embeddings is "false"': "expected true or false",
        "layer_types": "",
        'quantization_config = {"bits": 4}': "unknown here",
        "attention_dropout = 0.1": "only 0 is supported",
        "RoPE type 'yarn'": "is not supported",
    }.items():
        assert any(field in line and said in line for line in str(error.value).split("\n")), field


def is_told(name: str, raw: dict[str, Any]) -> bool:
    """Whether this is refused as a user can read it; another error goes through."""
    try:
        MODELS[name](raw, "config.json")
    except ValueError as error:
        if str(error).startswith("config.json: fields that are wrong"):
            return True
        raise
    return False


_ODD: list[Any] = [
    "x", "", -1, 0, 1.5, -0.5, True, float("inf"), float("nan"), [], [1], [None], {}, {"a": 1},
    {"type": ["x"]}, {"rope_type": "linear", "factor": "x"}, {"full_attention": 3},
    {"full_attention": {"rope_type": "linear", "factor": None}},
]  # fmt: skip


@pytest.mark.parametrize("name", list(CONFIGS))
def test_odd_values_are_errors_that_name_file_and_field(name: str) -> None:
    """Whatever stands in a field: a Spec, or a ValueError; a number is never taken for a flag."""
    more = {
        *("rope_scaling", "rope_parameters", "rope_theta", "layer_types", "head_dim"),
        *("attention_bias", "mlp_bias", "max_window_layers", "use_sliding_window"),
        *("mlp_only_layers", "norm_topk_prob", "rope_local_base_freq", "tie_word_embeddings"),
    }
    fields = {*CONFIGS[name], *more} - {"model_type"}
    told = {
        field for field in fields for value in _ODD if is_told(name, CONFIGS[name] | {field: value})
    }
    assert {"hidden_size", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"} <= told
