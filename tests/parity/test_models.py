"""The decoder against transformers: logits, gradients, greedy text, in float32, both ways."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from posttrain import config
from posttrain.jobs import convert
from posttrain.models import hf
from posttrain.models.hf import open_model
from posttrain.models.keys import file_names, places, to_file
from posttrain.models.spec import ModelConfig
from posttrain.sampling.engine import Engine
from posttrain.sampling.request import Sampling, alike
from posttrain.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.parity

_SHARED = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}
# caps that the numbers of a small model reach
_GEMMA = {"head_dim": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": _LINEAR, "head_dim": 24}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2Config", {"rope_theta": 1e6, "num_hidden_layers": 4, **_QWEN_WINDOW}),
    "qwen3": ("Qwen3Config", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3Config", {"head_dim": 32, "attention_bias": True}),
    "qwen3-window": ("Qwen3Config", {"head_dim": 24, "num_hidden_layers": 4, **_QWEN_WINDOW}),
    "mistral": ("MistralConfig", {"sliding_window": 40, "head_dim": 24}),
    "mistral-full": (
        "MistralConfig",
        {"sliding_window": None, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "gemma2": ("Gemma2Config", {"sliding_window": 32, "query_pre_attn_scalar": 20, **_GEMMA}),
    "gemma2-uncapped": (
        "Gemma2Config",
        {
            "sliding_window": 50,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "head_dim": 24,
            "num_hidden_layers": 4,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 30, "num_hidden_layers": 7, "sliding_window_pattern": 3, "head_dim": 24},
    ),
    "gemma3-scaled": (
        "Gemma3TextConfig",
        {
            "sliding_window": 20,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "head_dim": 16,
            "query_pre_attn_scalar": 30,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 60, "pad_token_id": 0}),
    "phi3-full": (
        "Phi3Config",
        {"num_key_value_heads": 4, "pad_token_id": 0, "tie_word_embeddings": True},
    ),
    "olmo2": ("Olmo2Config", {}),
    "olmo2-biases": (
        "Olmo2Config",
        {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "mixtral-window": (
        "MixtralConfig",
        {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 40, "head_dim": 24},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 24, "norm_topk_prob": True}),
    # layers 1 and 5 are mixtures
    "qwen3-moe-mixed": (
        "Qwen3MoeConfig",
        {
            **_EXPERTS,
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "tie_word_embeddings": True,
            "attention_bias": True,
            **_QWEN_WINDOW,
        },
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 8, "num_experts_per_tok": 2, "pad_token_id": None}),
    "olmoe-normalised": (
        "OlmoeConfig",
        {
            "num_experts": 5,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "attention_bias": True,
            "pad_token_id": None,
        },
    ),
}


# the engine is every family's: those whose layers or windows differ from a Llama's
GREEDY = (
    *("llama3", "qwen3-window", "mistral", "gemma2", "gemma3", "phi3", "olmo2"),
    "qwen3-moe-mixed",
)
# one of each family, with the most kinds of tensors
CONVERTED = (
    *("llama-biases", "qwen2", "qwen3-biases", "mistral", "gemma2-uncapped", "gemma3"),
    *("phi3", "olmo2-biases", "mixtral", "qwen3-moe-mixed", "olmoe"),
)


@dataclass
class Pair:
    """One model twice: transformers' and ours, loaded from the folder that it saved."""

    folder: Path
    torch_model: Any
    graph: Any
    state: Any
    spec: Any
    tokens: np.ndarray

    @functools.cached_property
    def ours(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits, and the gradients of the mean negative log-likelihood: compiled once."""
        rows, width = self.tokens.shape
        positions = np.tile(np.arange(width, dtype=np.int32), (rows, 1))
        ones = np.ones((rows, width), np.int32)

        def loss(state: Any) -> tuple[jax.Array, jax.Array]:
            logits = nnx.merge(self.graph, state).logits(self.tokens, positions, ones)
            logp = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.take_along_axis(logp, self.tokens[:, 1:, None], 2).mean(), logits

        grads, logits = jax.jit(jax.grad(loss, has_aux=True))(self.state)
        return np.asarray(logits), {path: np.asarray(g) for path, g in hf.flat_params(grads)}


def torch_logits(model: Any, tokens: np.ndarray) -> Any:
    import torch

    return model(torch.from_numpy(tokens.astype(np.int64))).logits


def in_file(name: str, array: np.ndarray, family: str) -> Iterator[tuple[str, np.ndarray]]:
    """A parameter as files have it: in transformers' memory a layer's experts are two arrays."""
    gate, up, down = ("gate_proj", "up_proj", "down_proj")
    if family == "mixtral":
        name, gate, up, down = name.replace(".mlp.", ".block_sparse_moe."), "w1", "w3", "w2"
    block, _, what = name.partition(".experts.")
    parts = {"gate_up_proj": (gate, up), "down_proj": (down,)}.get(what)
    if parts is None:
        yield name, array
        return
    for expert, matrix in enumerate(array):
        for part, rows in zip(parts, np.split(matrix, len(parts)), strict=True):
            yield f"{block}.experts.{expert}.{part}.weight", rows


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    import torch
    import transformers

    torch.manual_seed(0)
    kind, changes = SHAPES[request.param]
    config = getattr(transformers, kind)(**{**_SHARED, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, weight in model.named_parameters():  # biases and norms are born 0 and 1: hide nothing
        if weight.ndim == 1:
            ones = "norm" in name and "Gemma" not in kind  # whose norms' weights are less 1
            torch.nn.init.normal_(weight, 1.0 if ones else 0.0, 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    cfg = ModelConfig(path=str(folder), dtype="float32", remat="none", vocab_multiple=64)
    ours = open_model(cfg, make_mesh(MeshConfig(), jax.devices()[:1]))
    # without the tokens that pad, 0 and 1: torch gives their rows no gradient of the embedding
    tokens = np.random.default_rng(0).integers(2, 211, (3, 160)).astype(np.int32)
    return Pair(folder, model, ours.graph, ours.state, ours.spec, tokens)


def test_logits_are_equal(pair: Pair) -> None:
    want = torch_logits(pair.torch_model, pair.tokens).detach().numpy()
    gap = np.abs(pair.ours[0] - want).max()
    print(f"{pair.folder.name}: logits {gap:.1e} (std {want.std():.2f})")
    assert want.std() > 0.5
    assert gap < 2e-5


def test_gradients_are_equal(pair: Pair) -> None:
    """Every tensor's, by relative L2."""
    import torch

    model, tokens = pair.torch_model, pair.tokens
    model.zero_grad()
    targets = torch.from_numpy(tokens[:, 1:].astype(np.int64))
    logits = torch_logits(model, tokens)[:, :-1]
    torch.nn.functional.cross_entropy(logits.reshape(-1, 211), targets.reshape(-1)).backward()
    want = dict(
        part
        for name, p in model.named_parameters()
        for part in in_file(name, p.grad.numpy(), model.config.model_type)
    )

    seen, worst, grads = set(), 0.0, pair.ours[1]
    placed = places({path: g.shape for path, g in grads.items()}, pair.spec, 211)
    for path, grad in grads.items():
        key, first = placed[path].key, placed[path].first
        for index, name in file_names(path, pair.spec):
            own = to_file(key, grad[index])[:211]
            theirs = want[name][first : first + len(own)]
            gap = np.linalg.norm(own - theirs) / max(np.linalg.norm(theirs), 1e-4)
            worst = max(worst, gap)
            assert gap < 1e-4, (name, gap)
            seen.add(name)
    print(f"{pair.folder.name}: gradients {worst:.1e}")
    assert seen == set(want)


@pytest.mark.parametrize("pair", CONVERTED, indirect=True)
def test_converted_and_converted_back_tensors_are_byte_equal(pair: Pair, tmp_path: Path) -> None:
    """`posttrain convert`, by eight devices to many files and back by others to one; transformers
    opens them without a complaint."""
    there, back = tmp_path / "there", tmp_path / "back"
    meshes = ("mesh.fsdp=4 mesh.tensor=2", "mesh.data=2 mesh.fsdp=1 mesh.tensor=4")
    for source, out, size, mesh in zip(
        (pair.folder, there), (there, back), (5e-5, 5.0), meshes, strict=True
    ):
        keys = [f"source={source}", f"out={out}", f"max_file_gb={size}", *mesh.split()]
        assert convert.run(config.load(convert.Config, [], keys)) == 0
    assert len(list(there.glob("*.safetensors"))) > 1
    want = load_file(pair.folder / "model.safetensors")
    for folder in (there, back):
        found = {n: x for file in folder.glob("*.safetensors") for n, x in load_file(file).items()}
        assert {n: x.tobytes() for n, x in found.items()} == {
            n: x.tobytes() for n, x in want.items()
        }
    import transformers

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(there, output_loading_info=True)
    opened, info = loaded
    assert not any(info.values()), info
    assert type(opened) is type(pair.torch_model)
    logits = torch_logits(opened.eval(), pair.tokens[:1])
    assert (logits == torch_logits(pair.torch_model, pair.tokens[:1])).all()


@pytest.mark.parametrize("pair", GREEDY, indirect=True)
def test_greedy_text_is_equal(pair: Pair) -> None:
    """Beyond the window where there is one: what has left it must not be seen."""
    import torch

    prompts = [row[:n].tolist() for row, n in zip(pair.tokens, (3, 20, 50), strict=True)]
    asked = alike(prompts, Sampling(max_new_tokens=30, temperature=0))
    ours = Engine(nnx.merge(pair.graph, pair.state), slots=3).generate(asked)
    for prompt, (found,) in zip(prompts, ours, strict=True):
        want = pair.torch_model.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None,
            pad_token_id=0, attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )  # fmt: skip
        assert found.tokens == want[0, len(prompt) :].tolist()
