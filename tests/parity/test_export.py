"""Folders that we write, opened by transformers: the same logits, the same greedy text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from posttrain.models import hf
from posttrain.models.spec import ModelConfig
from posttrain.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.parity

_SHARED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 150,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.1,
}
# as configs were written before transformers 5, which must read them the same way
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **_SHARED,
    },
    "qwen2": {
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "sliding_window": 32,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        **_SHARED,
    },
    "qwen3": {
        "model_type": "qwen3",
        "rope_theta": 1000000.0,
        "head_dim": 32,
        "attention_bias": False,
        "tie_word_embeddings": True,
        **_SHARED,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 20, "rope_theta": 10000.0, **_SHARED},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 20,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        "cache_implementation": "hybrid",
        **_SHARED,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 20,
        "sliding_window_pattern": 2,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        **_SHARED,
        "num_hidden_layers": 3,
    },
    "phi3": {
        "model_type": "phi3",
        "sliding_window": 20,
        "rope_scaling": None,
        "original_max_position_embeddings": 4096,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        **_SHARED,
    },
    "olmo2": {"model_type": "olmo2", "rope_theta": 500000, "pad_token_id": 1, **_SHARED},
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        **_SHARED,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 32,
        "mlp_only_layers": [0],
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        **_SHARED,
    },
    "olmoe": {
        "model_type": "olmoe",
        "clip_qkv": None,
        "norm_topk_prob": False,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "pad_token_id": None,
        "eos_token_id": 2,
        **_SHARED,
    },
}
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")


def logits(model: hf.Model, tokens: np.ndarray) -> np.ndarray:
    rows, width = tokens.shape
    positions = np.tile(np.arange(width, dtype=np.int32), (rows, 1))
    ones = np.ones((rows, width), np.int32)
    network = jax.jit(lambda s: nnx.merge(model.graph, s).logits(tokens, positions, ones))
    return np.asarray(network(model.state))


@pytest.mark.parametrize(
    ("name", "shape"),  # data, fsdp, tensor, expert
    [
        ("llama", (1, 1, 1, 1)),
        *((name, (1, 2, 2, 2) if name in MIXTURES else (2, 2, 2, 1)) for name in CONFIGS),
    ],
)
def test_transformers_opens_what_we_save(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    """Two added tokens and padding rows here; several files; new rows are part of the logits."""
    import torch
    import transformers

    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    data, fsdp, tensor, expert = shape
    mesh_cfg = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, expert=expert)
    mesh = make_mesh(mesh_cfg, jax.devices()[: data * fsdp * tensor * expert])
    cfg = ModelConfig(
        path=str(tmp_path), random_init=True, dtype="float32", remat="none", vocab_multiple=64
    )
    with jax.set_mesh(mesh):
        model = hf.open_model(cfg, mesh, tokenizer_size=152)
        tokens = np.random.default_rng(0).integers(0, 152, (8, 96)).astype(np.int32)
        found = logits(model, tokens)
        out = tmp_path / "export"
        hf.save(out, model.spec, model.state, shard_bytes=50_000, stop_ids=(150, 3))
    assert len(list(out.glob("*.safetensors"))) > 2
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.generation_config.eos_token_id == [150, 3]
    want = theirs.eval()(torch.from_numpy(tokens.astype(np.int64))).logits.detach().numpy()
    assert want.shape == found.shape == (8, 96, 152)
    assert np.abs(found - want).max() < 2e-5
    assert want.std() > 0.5


def test_bfloat16_exports_open_in_their_dtype(tmp_path: Path) -> None:
    import torch
    import transformers

    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3"]))
    cfg = ModelConfig(path=str(tmp_path), random_init=True)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = hf.open_model(cfg, mesh)
    hf.save(tmp_path / "export", model.spec, model.state, dtype="bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    own = dict(hf.flat_params(model.state))["embedding"][: model.spec.vocab_size]
    table = theirs.model.embed_tokens.weight.float().detach().numpy()
    np.testing.assert_array_equal(table, np.asarray(own.astype("bfloat16").astype("float32")))
