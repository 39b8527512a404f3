"""The scalar head: read at each segment's last token, however a row is padded or packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posttrain.config import ConfigError
from posttrain.models import hf, read_spec
from posttrain.models.score import segment_scores, token_values
from posttrain.models.spec import ModelConfig
from tests.models.tiny import mesh_of, write_config

LENGTHS = [5, 17, 1, 9]


def by_loop(hidden: np.ndarray, w: np.ndarray, segments: np.ndarray, count: int) -> np.ndarray:
    found = np.zeros((len(hidden), count))
    for b, row in enumerate(segments):
        for t, number in enumerate(row):
            if number:
                found[b, number - 1] = hidden[b, t].astype(np.float64) @ w[:, 0].astype(np.float64)
    return found


def test_scores_are_those_of_the_last_tokens_and_only_they_have_a_gradient() -> None:
    rng = np.random.default_rng(0)
    rows = [
        [1, 1, 1, 2, 2, 3, 0, 0],  # packed, padding on the right
        [0, 0, 0, 1, 1, 1, 1, 1],  # padding on the left
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 0, 0, 2, 2, 0, 0],  # on both, and between
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    segments = np.array(rows, np.int32)
    hidden = rng.normal(size=(5, 8, 6)).astype(np.float32)
    w = rng.normal(size=(6, 1)).astype(np.float32)
    found = segment_scores(jnp.asarray(hidden), jnp.asarray(w), jnp.asarray(segments), 4)
    np.testing.assert_allclose(found, by_loop(hidden, w, segments, 4), rtol=1e-5, atol=1e-6)
    assert found.dtype == jnp.float32

    def total(h):
        return segment_scores(h, jnp.asarray(w), jnp.asarray(segments), 4).sum()

    touched = np.asarray(jax.grad(total)(jnp.asarray(hidden))).any(-1)
    ends = [(0, 2), (0, 4), (0, 5), (1, 7), (2, 7), (3, 1), (3, 5)]
    assert [tuple(at) for at in np.argwhere(touched)] == ends


def test_hidden_states_in_bfloat16_are_not_rounded_again() -> None:
    """Their product is float32: two near rewards stay apart."""
    hidden = jnp.ones((1, 2, 512), jnp.bfloat16).at[0, 1, 0].set(1.0078125)
    w = jnp.full((512, 1), 0.3, jnp.float32)
    scores = segment_scores(hidden, w, jnp.array([[1, 2]]), 2)[0]
    assert float(scores[1] - scores[0]) == pytest.approx(0.3 * 0.0078125, rel=0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> hf.Model:
    folder = write_config(tmp_path_factory.mktemp("model"), "llama")
    cfg = ModelConfig(
        path=str(folder), dtype="float32", remat="none", vocab_multiple=1, random_init=True
    )
    return hf.open_model(cfg, mesh_of(1, 1, 1), head="score", new_head=True)


def scores(model: hf.Model, rows: list[list[tuple[int, int]]], width: int) -> np.ndarray:
    """[rows, S]. A row lists its segments: (which of LENGTHS, where it begins)."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 160, n) for n in LENGTHS]
    texts[1][-1] = 0  # ends with the token that pads
    tokens, positions, segments = np.zeros((3, len(rows), width), np.int32)
    for b, row in enumerate(rows):
        for s, (which, start) in enumerate(row):
            place = slice(start, start + LENGTHS[which])
            tokens[b, place] = texts[which]
            positions[b, place] = np.arange(LENGTHS[which])
            segments[b, place] = s + 1

    def run(state: Any) -> jax.Array:
        network = nnx.merge(model.graph, state)
        return network.scores(network.hidden(tokens, positions, segments), jnp.asarray(segments), 4)

    return np.asarray(jax.jit(run)(model.state))


def test_packed_or_padded_on_either_side_a_text_has_one_score(model: hf.Model) -> None:
    """As a row of its own, with nothing else, is what all others must equal."""
    want = [scores(model, [[(i, 0)]], LENGTHS[i])[0, 0] for i in range(4)]
    assert np.std(want) > 0.05
    right = scores(model, [[(i, 0)] for i in range(4)], 20)[:, 0]
    left = scores(model, [[(i, 20 - LENGTHS[i])] for i in range(4)], 20)[:, 0]
    packed = scores(model, [[(3, 0), (1, 9), (2, 26), (0, 27)]], 40)[0, [3, 1, 2, 0]]
    for name, found in {"right": right, "left": left, "packed": packed}.items():
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_head_takes_the_place_of_the_vocabularys(model: hf.Model, tmp_path: Path) -> None:
    flat = dict(hf.flat_params(model.state))
    assert flat["score"].shape == (64, 1)
    assert "head" not in flat
    assert model.spec.parameters == sum(x.size for x in flat.values())


def test_an_export_has_one_label_whatever_the_language_model_said(
    model: hf.Model, tmp_path: Path
) -> None:
    """Old versions of transformers wrote two into every config.json."""
    two = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "num_labels": 2}
    folder = write_config(tmp_path / "language", "llama", **two)
    cfg = ModelConfig(path=str(folder), random_init=True, vocab_multiple=1)
    made = hf.open_model(cfg, mesh_of(1, 1, 1), head="score", new_head=True)
    hf.save(tmp_path / "export", made.spec, model.state)
    raw = json.loads((tmp_path / "export" / "config.json").read_text())
    assert raw["id2label"] == {"0": "LABEL_0"}
    assert raw["label2id"] == {"LABEL_0": 0}
    assert "num_labels" not in raw
    assert read_spec(tmp_path / "export").head == "score"


def test_pitfall_26_a_value_is_of_the_state_before_its_token() -> None:
    """Read one position before, within the segment: a segment's first token has none."""
    rng = np.random.default_rng(0)
    segments = np.array([[0, 1, 1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
    hidden, w = rng.normal(size=(2, 8, 6)), rng.normal(size=(6, 1))
    want = np.zeros((2, 8))
    for b, t in np.ndindex(2, 8):
        if t and segments[b, t] and segments[b, t] == segments[b, t - 1]:
            want[b, t] = hidden[b, t - 1] @ w[:, 0]
    h, w_D1 = jnp.asarray(hidden, jnp.float32), jnp.asarray(w, jnp.float32)
    found = token_values(h, w_D1, jnp.asarray(segments))
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_a_critic_takes_over_the_head_of_a_reward_model(model: hf.Model, tmp_path: Path) -> None:
    """Its values, one token further on, are that model's scores of the texts so far; what it is
    saved as is a sequence classifier again."""
    hf.save(tmp_path / "reward", model.spec, model.state)
    options = {"dtype": "float32", "remat": "none", "vocab_multiple": 1}
    cfg = ModelConfig(path=str(tmp_path / "reward"), **options)
    mesh = mesh_of(1, 1, 1)
    critic = hf.open_model(cfg, mesh, head="value")
    assert not critic.new_head
    assert critic.spec.parameters == model.spec.parameters
    tokens = np.random.default_rng(2).integers(0, 160, (1, 7))
    positions, segments = np.arange(7)[None], np.ones((1, 7), np.int32)

    def run(state: Any) -> tuple[jax.Array, jax.Array]:
        network = nnx.merge(critic.graph, state)
        hidden = network.hidden(tokens, positions, segments)
        return network.values(hidden, jnp.asarray(segments)), hidden

    values, hidden = jax.jit(run)(critic.state)
    weight = np.asarray(dict(hf.flat_params(model.state))["score"])[:, 0]
    np.testing.assert_allclose(values[0, 1:], np.asarray(hidden)[0, :-1] @ weight, atol=1e-5)
    assert values[0, 0] == 0

    hf.save(tmp_path / "critic", critic.spec, critic.state)
    assert read_spec(tmp_path / "critic").head == "score"
    with pytest.raises(ConfigError, match="name the language model"):
        hf.open_model(cfg, mesh, head="lm")


def test_a_critic_of_a_language_model_has_a_new_head(tmp_path: Path) -> None:
    cfg = ModelConfig(path=str(write_config(tmp_path, "llama")), random_init=True)
    critic = hf.open_model(cfg, mesh_of(1, 1, 1), head="value", new_head=True)
    assert critic.new_head
    assert {"score"} == {path for path, _ in hf.flat_params(critic.state)} & {"score", "head"}
    with pytest.raises(ConfigError, match="no score head"):
        hf.open_model(cfg, mesh_of(1, 1, 1), head="value")
