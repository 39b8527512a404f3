"""config.json of tiny models, one per family, and how tests open them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax

from posttrain.models.hf import Model, open_model
from posttrain.models.spec import ModelConfig
from posttrain.sharding import MeshConfig, make_mesh

_SHARED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    # wide, so that logits of random weights are far from uniform
    "initializer_range": 0.15,
}
_GEMMA = {k: v for k, v in _SHARED.items() if k != "hidden_act"} | {
    "hidden_activation": "gelu_pytorch_tanh"
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False, **_SHARED},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, **_SHARED},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 24, **_SHARED},
    "mistral": {"model_type": "mistral", "sliding_window": 5, **_SHARED},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 24,
        "query_pre_attn_scalar": 20,
        "sliding_window": 5,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 6.0,
        **_GEMMA,
    },
    # a period of two, twice, and a layer more
    "gemma3_text": {
        "model_type": "gemma3_text",
        "head_dim": 24,
        "query_pre_attn_scalar": 20,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 100.0,
        **_GEMMA,
        "num_hidden_layers": 5,
    },
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False, **_SHARED},
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False, **_SHARED},
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        **_SHARED,
    },
    # a dense layer, then a mixture
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "head_dim": 24,
        **_SHARED,
    },
    "olmoe": {"model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 2, **_SHARED},
}
MESHES = [(1, 1, 1), (2, 4, 1), (1, 4, 2), (1, 1, 8)]


def mesh_of(
    data: int, fsdp: int, tensor: int, expert: int = 1, context: int = 1, fsdp_inner: int = 0
) -> jax.sharding.Mesh:
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": expert, "context": context}
    cfg = MeshConfig(**sizes, fsdp_inner=fsdp_inner)
    return make_mesh(cfg, jax.devices()[: math.prod(sizes.values())])


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | changes))
    return folder


def open_tiny(folder: Path, name: str, mesh: jax.sharding.Mesh, **options: Any) -> Model:
    """A random model of the family; options are ModelConfig's."""
    write_config(folder, name)
    defaults = {"dtype": "float32", "remat": "none", "vocab_multiple": 1, "random_init": True}
    return open_model(ModelConfig(path=str(folder), **(defaults | options)), mesh)
