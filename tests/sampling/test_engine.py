"""Decoding: a real model's known text, log-probs of the full forward pass, stops, streaming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from posttrain.models.hf import open_model
from posttrain.models.spec import ModelConfig
from posttrain.sampling import engine
from posttrain.sampling.engine import Completion, Engine
from tests.models.tiny import mesh_of, open_tiny

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 90,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}
PROMPTS = [[5], [17, 3, 80, 2, 9], list(range(20, 60))]


def network(folder: Path, mesh: jax.sharding.Mesh, **options: Any) -> Any:
    options = {"dtype": "float32", "remat": "none"} | options
    model = open_model(ModelConfig(path=str(folder), **options), mesh)
    return nnx.merge(model.graph, model.state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return network(folder, mesh_of(1, 1, 1), random_init=True)


@pytest.fixture(scope="module")
def greedy(model: Any) -> list[Completion]:
    return Engine(model).generate(PROMPTS, max_new_tokens=12)


def test_greedy_text_of_a_real_model(data_dir: Path) -> None:
    """stories260K goes on as its authors' own program does, to the last of 256 tokens."""
    folder = data_dir / "data" / "models" / "stories260K"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    want = (folder / "greedy_golden.txt").read_text().strip()
    found = Engine(network(folder, mesh_of(1, 1, 1))).generate([[1]], max_new_tokens=256)
    assert tokenizer.decode(found[0].tokens).strip() == want
    assert len(found[0].tokens) == 256


def full_logps(model: Any, sequence: list[int]) -> np.ndarray:
    """log p of each token after the first, by one pass over the whole sequence."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(sequence)] = sequence
    graph, state = nnx.split(model)
    logits = jax.jit(
        lambda state, tokens: nnx.merge(graph, state).logits(
            tokens, np.arange(64)[None], np.ones((1, 64), np.int32)
        )
    )(state, tokens)
    logp = np.asarray(jax.nn.log_softmax(logits[0]))
    return np.array([logp[t - 1, sequence[t]] for t in range(1, len(sequence))])


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_log_probs_equal_a_full_forward_pass(model: Any, temperature: float) -> None:
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": 1}
    for prompt, found in zip(PROMPTS, Engine(model).generate(PROMPTS, **options), strict=True):
        assert len(found.tokens) == 12
        want = full_logps(model, prompt + found.tokens)[len(prompt) - 1 :]
        np.testing.assert_allclose(found.logps, want, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),  # data, fsdp, tensor, expert
    [("gemma2", (1, 1, 1, 1)), ("gemma3_text", (1, 1, 1, 1)), ("mixtral", (1, 2, 1, 2))],
)
def test_windows_caps_ropes_and_experts_hold_in_decoding(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    """Prompts and texts longer than the window of 5, on either side of it."""
    opened = open_tiny(tmp_path, name, mesh_of(*shape))
    model = nnx.merge(opened.graph, opened.state)
    prompts = [[7, 3], list(range(20))]
    for prompt, found in zip(
        prompts, Engine(model).generate(prompts, max_new_tokens=12, temperature=1.0), strict=True
    ):
        want = full_logps(model, prompt + found.tokens)[len(prompt) - 1 :]
        np.testing.assert_allclose(found.logps, want, atol=1e-5)


def test_greedy_is_the_most_probable_token(model: Any, greedy: list[Completion]) -> None:
    graph, state = nnx.split(model)
    tokens = np.zeros((1, 64), np.int32)
    sequence = PROMPTS[1] + greedy[1].tokens
    tokens[0, : len(sequence)] = sequence
    args = (tokens, np.arange(64)[None], np.ones((1, 64), np.int32))
    logits = jax.jit(lambda state: nnx.merge(graph, state).logits(*args))(state)
    best = np.asarray(logits[0]).argmax(-1)
    assert greedy[1].tokens == best[len(PROMPTS[1]) - 1 : len(sequence) - 1].tolist()
    assert len(set(greedy[1].tokens)) > 2


def test_every_mesh_writes_the_same(folder: Path, model: Any, greedy: list[Completion]) -> None:
    drawn = Engine(model).generate(PROMPTS, max_new_tokens=8, temperature=1.0, top_p=0.9, seed=3)
    other = Engine(network(folder, mesh_of(2, 2, 2), random_init=True))
    for want, found in zip(greedy, other.generate(PROMPTS, max_new_tokens=12), strict=True):
        assert found.tokens == want.tokens
        np.testing.assert_allclose(found.logps, want.logps, atol=1e-5)
    again = other.generate(PROMPTS, max_new_tokens=8, temperature=1.0, top_p=0.9, seed=3)
    assert [c.tokens for c in again] == [c.tokens for c in drawn]


def test_stop_tokens_end_a_row_and_leave_the_others_alone(
    model: Any, greedy: list[Completion]
) -> None:
    stop = greedy[1].tokens[4]
    first = greedy[1].tokens.index(stop)
    found = Engine(model).generate(PROMPTS, max_new_tokens=12, stop_ids=[stop, 89])
    assert found[1].tokens == greedy[1].tokens[: first + 1]
    assert found[1].stopped
    assert len(found[1].logps) == len(found[1].tokens)
    for row in (0, 2):
        if stop not in greedy[row].tokens:
            assert found[row].tokens == greedy[row].tokens
            assert not found[row].stopped


def test_tokens_are_told_one_by_one_as_they_come(model: Any, greedy: list[Completion]) -> None:
    told: list[tuple[int, int]] = []
    found = Engine(model).generate(
        PROMPTS, max_new_tokens=12, on_token=lambda row, token: told.append((row, token))
    )
    assert [c.tokens for c in found] == [c.tokens for c in greedy]
    assert told[:3] == [(row, greedy[row].tokens[0]) for row in range(3)]
    for row in range(3):
        assert [token for r, token in told if r == row] == greedy[row].tokens


def test_a_draw_depends_on_seed_row_and_position_alone(model: Any) -> None:
    options = {"max_new_tokens": 10, "temperature": 1.0}
    whole = engine.generate(model, PROMPTS, seed=1, **options)
    assert engine.generate(model, PROMPTS[:1], seed=1, **options) == whole[:1]
    assert engine.generate(model, PROMPTS, seed=2, **options) != whole
    twice = engine.generate(model, [PROMPTS[0]] * 2, seed=1, **options)
    assert twice[0] != twice[1]


def test_generation_ends_with_the_models_context(model: Any) -> None:
    """64 positions: a prompt of 60 has room for 4 tokens; one of 64 for none."""
    found = engine.generate(model, [list(range(60))], max_new_tokens=20)
    assert len(found[0]) == 4
    with pytest.raises(ValueError, match="prompt 1 has 64 tokens; this model takes 1 to 63"):
        engine.generate(model, [[1], [2] * 64], max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        engine.generate(model, [[]], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        engine.generate(model, [[1]], max_new_tokens=0)
    assert engine.generate(model, [], max_new_tokens=1) == []


def test_padding_rows_of_the_vocabulary_are_never_drawn(folder: Path) -> None:
    """90 tokens in 128 rows; at a temperature that makes all rows alike."""
    wide = network(folder, mesh_of(1, 1, 1), random_init=True, vocab_multiple=128)
    found = engine.generate(wide, [[1]] * 8, max_new_tokens=32, temperature=1e6)
    drawn = {token for tokens in found for token in tokens}
    assert max(drawn) < 90
    assert len(drawn) > 60


def test_other_lengths_in_the_same_bucket_compile_nothing(model: Any) -> None:
    ready = Engine(model)
    ready.generate([[1, 2, 3]], max_new_tokens=4)
    before = (engine._prefill._cache_size(), engine._decode._cache_size())
    ready.generate([[4, 5, 6, 7, 8]], max_new_tokens=9)
    Engine(model).generate([[4]], max_new_tokens=2)
    assert (engine._prefill._cache_size(), engine._decode._cache_size()) == before
