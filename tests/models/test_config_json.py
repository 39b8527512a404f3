"""config.json as it is published, and broken in every way: read, or told by file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.models import MODELS, read_spec
from posttrain.models.spec import LayerKind, Rope
from tests.models.tiny import CONFIGS

LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_GENERIC = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
}


def sizes(
    hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, positions: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
    }


_GEMMA = {
    "attention_bias": False,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "cache_implementation": "hybrid",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
}
_GEMMA2 = _GEMMA | {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
_GEMMA3 = _GEMMA | {
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
}
_PHI = {
    "model_type": "phi3",
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "use_sliding_window": False}
# Fields as the models were released, what all of them have left out; the parameters their makers
# state.
RELEASED: dict[str, tuple[dict[str, Any], float]] = {
    "Llama-3.2-1B": (
        {
            "model_type": "llama",
            **sizes(2048, 8192, 16, 32, 8, 128256, 131072),
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": LLAMA3,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
        1.236e9,
    ),
    "SmolLM2-135M": (
        {
            "model_type": "llama",
            **sizes(576, 1536, 30, 9, 3, 49152, 8192),
            "attention_bias": False,
            "hidden_act": "silu",
            "is_llama_config": True,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        },
        134.5e6,
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral",
            **sizes(4096, 14336, 32, 32, 8, 32000, 32768),
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
        7.242e9,
    ),
    "Mistral-7B-v0.3": (
        {
            "model_type": "mistral",
            **sizes(4096, 14336, 32, 32, 8, 32768, 32768),
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        7.248e9,
    ),
    "gemma-2-2b": ({**_GEMMA2, **sizes(2304, 9216, 26, 8, 4, 256000, 8192)}, 2.614e9),
    "gemma-2-9b": (
        {**_GEMMA2, **sizes(3584, 14336, 42, 16, 8, 256000, 8192), "sliding_window_size": 4096},
        9.242e9,
    ),
    "gemma-3-1b": (
        {**_GEMMA3, **sizes(1152, 6912, 26, 4, 1, 262144, 32768), "sliding_window_pattern": 6},
        999.9e6,
    ),
    "gemma-3-270m": (
        {
            **_GEMMA3,
            **sizes(640, 2048, 18, 4, 1, 262144, 32768),
            "_sliding_window_pattern": 6,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
            "use_bidirectional_attention": False,
        },
        268.1e6,
    ),
    "Phi-3-mini-4k": (
        {
            **_PHI,
            **sizes(3072, 8192, 32, 32, 32, 32064, 4096),
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
        },
        3.821e9,
    ),
    "phi-4": (
        {
            **_PHI,
            **sizes(5120, 17920, 40, 40, 10, 100352, 16384),
            "original_max_position_embeddings": 16384,
            "rope_theta": 250000,
            "sliding_window": None,
        },
        14.66e9,
    ),
    "OLMo-2-7B": (
        {
            "model_type": "olmo2",
            **sizes(4096, 11008, 32, 32, 32, 100352, 4096),
            "attention_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
        },
        7.299e9,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2",
            **_QWEN,
            **sizes(896, 4864, 24, 14, 2, 151936, 32768),
            "max_window_layers": 24,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
        },
        494.0e6,
    ),
    "Qwen3-0.6B": (
        {
            "model_type": "qwen3",
            **_QWEN,
            **sizes(1024, 3072, 28, 16, 8, 151936, 40960),
            "attention_bias": False,
            "head_dim": 128,
            "max_window_layers": 28,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
        596.0e6,
    ),
}


def write(folder: Path, raw: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", list(RELEASED))
def test_released_models_are_read(tmp_path: Path, name: str) -> None:
    raw, parameters = RELEASED[name]
    spec = read_spec(write(tmp_path, _GENERIC | raw))
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
