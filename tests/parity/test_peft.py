"""Adapters against PEFT: its forward pass and ours, of its folder and of ours, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from posttrain.models import peft as ours
from posttrain.models.adapters import attach
from posttrain.models.hf import open_model
from posttrain.models.lora import LoraConfig, is_adapter
from posttrain.models.nested import flat, nested
from posttrain.models.peft_config import check_config
from posttrain.models.spec import ModelConfig
from tests.models.tiny import mesh_of

pytestmark = pytest.mark.parity

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 64,
    "initializer_range": 0.08,
}
TOKENS = np.random.default_rng(0).integers(0, 213, (3, 20)).astype(np.int32)
CASES = {
    "phi3": ("Phi3Config", {"pad_token_id": 0}, {"targets": ("*",), "rank": 3, "alpha": 6.0}),
    "llama": ("LlamaConfig", {}, {"targets": ("attention/*", "mlp/*"), "rank": 5, "alpha": 12.0}),
    "qwen3": (
        "Qwen3Config",
        {"head_dim": 24, "tie_word_embeddings": True},
        {"targets": ("q", "v", "down"), "rank": 4, "alpha": 6.0, "rslora": True},
    ),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder of a base model, our LoraConfig)."""
    import torch
    import transformers

    kind, changes, lora = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**_SHAPE, **changes})
    folder = tmp_path_factory.mktemp(request.param)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder, LoraConfig(**lora)


def base_of(folder: Path, tokens: int = _SHAPE["vocab_size"]) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    if tokens > model.config.vocab_size:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def our_model(folder: Path, cfg: LoraConfig, new: int = 0) -> tuple[Any, Any, dict, Any]:
    """(spec, graph, params, mesh), with fresh adapters."""
    mesh, vocab = mesh_of(1, 1, 1), _SHAPE["vocab_size"]
    options = {"dtype": "float32", "remat": "none", "vocab_multiple": 1}
    new_ids = range(vocab, vocab + new)
    with jax.set_mesh(mesh):
        made = open_model(ModelConfig(path=str(folder), **options), mesh,
                          tokenizer_size=vocab + new, new_ids=new_ids)  # fmt: skip
        graph, state = attach(made.graph, made.state, cfg, mesh, new_ids=new_ids)
    return made.spec, graph, nnx.to_pure_dict(state), mesh


def our_logits(graph: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    model = nnx.merge(graph, nnx.State(params))
    places = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    return np.asarray(model.logits(tokens, places, np.ones_like(tokens)))


def test_an_adapter_that_peft_wrote_says_here_what_it_says_there(case: Any, tmp_path: Path) -> None:
    import peft
    import torch

    folder, cfg = case
    names = {"q": "q_proj", "v": "v_proj", "down": "down_proj"}
    whole = [] if "q" in cfg.targets else ["lm_head"]
    every = "all-linear"
    targets = [names[x] for x in cfg.targets] if "q" in cfg.targets else every
    config = peft.LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, use_rslora=cfg.rslora,
                             target_modules=targets, modules_to_save=whole or None,
                             task_type="CAUSAL_LM")  # fmt: skip
    torch.manual_seed(1)
    model = peft.get_peft_model(base_of(folder), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path)
    check_config(tmp_path, cfg)
    spec, graph, params, mesh = our_model(folder, cfg)
    tokens = TOKENS.clip(max=210)
    before = our_logits(graph, params, tokens)
    with jax.set_mesh(mesh):
        params, found_whole = ours.load(tmp_path, spec, params, cfg, range(0))
    assert found_whole == ["head"] * len(whole)
    found, want = our_logits(graph, params, tokens), their_logits(model, tokens)
    assert np.abs(want - before).max() > 0.1
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize(("new", "beside"), [
    (0, ()), (2, ("final_norm",)), (2, ("embedding", "head")),
])  # fmt: skip
def test_an_adapter_that_we_wrote_says_there_what_it_says_here(
    case: Any, tmp_path: Path, new: int, beside: tuple[str, ...]
) -> None:
    """With rows for new tokens too, and what is trained whole beside it: a norm, the tables."""
    import peft

    folder, cfg = case
    spec, graph, params, mesh = our_model(folder, cfg, new)
    rng = np.random.default_rng(2)

    def trains(path: str) -> bool:
        return is_adapter(path) or path in beside

    params = nested(
        (p, x + rng.normal(0, 0.1, x.shape).astype(np.float32) if trains(p) else x)
        for p, x in flat(params)
    )
    vocab = _SHAPE["vocab_size"]
    with jax.set_mesh(mesh):
        ours.save(tmp_path, spec, params, trains, cfg, base=str(folder),
                  new_ids=range(vocab, vocab + new))  # fmt: skip
    tokens = TOKENS if new else TOKENS.clip(max=210)
    model = peft.PeftModel.from_pretrained(base_of(folder, vocab + new), tmp_path)
    np.testing.assert_allclose(
        our_logits(graph, params, tokens), their_logits(model, tokens), atol=1e-5
    )
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["r"] == cfg.rank
    assert model.peft_config["default"].use_rslora == cfg.rslora
    merged = their_logits(model.merge_and_unload(), tokens)
    np.testing.assert_allclose(merged, our_logits(graph, params, tokens), atol=1e-5)
    blank = nested((p, x * 0 if trains(p) else x) for p, x in flat(params))
    with jax.set_mesh(mesh):
        read, _ = ours.load(tmp_path, spec, blank, cfg, range(vocab, vocab + new))
    np.testing.assert_allclose(our_logits(graph, read, tokens), merged, atol=1e-5)


def test_scores_of_a_reward_models_adapter_are_equal_there(case: Any, tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    folder, cfg = case
    mesh = mesh_of(1, 1, 1)
    options = {"dtype": "float32", "remat": "none", "vocab_multiple": 1}
    with jax.set_mesh(mesh):
        made = open_model(ModelConfig(path=str(folder), **options), mesh, head="score",
                          new_head=True)  # fmt: skip
        graph, state = attach(made.graph, made.state, cfg, mesh)
    rng = np.random.default_rng(2)

    def trains(path: str) -> bool:
        return is_adapter(path) or path == "score"

    params = nested(
        (p, x + rng.normal(0, 0.1, x.shape).astype(np.float32) if trains(p) else x)
        for p, x in flat(nnx.to_pure_dict(state))
    )
    with jax.set_mesh(mesh):
        ours.save(tmp_path, made.spec, params, trains, cfg, base=str(folder),
                  new_ids=range(0), task="SEQ_CLS")  # fmt: skip
    tokens = TOKENS.clip(max=210)
    model = nnx.merge(graph, nnx.State(params))
    places = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    ones = np.ones_like(tokens)
    found = model.scores(model.hidden(tokens, places, ones), jax.numpy.asarray(ones), 1)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    base.config.pad_token_id = 0
    theirs = peft.PeftModel.from_pretrained(base.float(), tmp_path).eval()
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(np.asarray(found), want, atol=1e-5)
