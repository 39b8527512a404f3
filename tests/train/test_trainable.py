"""Which parameters are trained: the split and its whole, and a step of a part of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from posttrain.config import ConfigError
from posttrain.losses.nll import NLL
from posttrain.models import nested
from posttrain.train import trainable
from posttrain.train.config import TrainConfig
from posttrain.train.state import new_state
from posttrain.train.step import Forward, train_step_fn
from posttrain.types import Batch
from tests.models.tiny import mesh_of, open_tiny

PARAMS = {
    "embedding": np.zeros(10),
    "layers": {"0": {"attention": {"q": np.zeros(30), "q_norm": np.zeros(2)}, "mlp_norm": 5}},
    "final_norm": np.zeros(3),
}
PATHS = [
    *("embedding", "layers/0/attention/q", "layers/0/attention/q_norm"),
    *("layers/0/mlp_norm", "final_norm"),
]


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        ({}, PATHS),
        ({"frozen": ("embedding",)}, PATHS[1:]),
        ({"trainable": ("layers/*",)}, PATHS[1:4]),
        ({"trainable": ("layers/*", "final_norm"), "frozen": ("*norm",)}, PATHS[1:2]),
        ({"trainable": ("q",)}, ["layers/0/attention/q"]),
        ({"trainable": ("attention/*",)}, PATHS[1:3]),
    ],
)
def test_patterns_say_which(config: dict[str, Any], trained: list[str]) -> None:
    rule = trainable.trained_rule(TrainConfig(**config), PARAMS)
    taken, rest = nested.split(PARAMS, rule)
    assert [path for path, _ in nested.flat(taken)] == trained
    assert len(list(nested.flat(rest))) == len(PATHS) - len(trained)
    assert nested.join(taken, rest) == PARAMS
    assert nested.join(rest, taken) == PARAMS


def test_where_all_is_trained_nothing_is_beside_it() -> None:
    taken, rest = nested.split(PARAMS, trainable.trained_rule(TrainConfig(), PARAMS))
    assert rest == {}
    assert nested.join(taken, rest) is taken


def test_patterns_that_name_nothing_are_refused_all_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        trainable.trained_rule(TrainConfig(trainable=("k", "layers/*"), frozen=("heads",)), PARAMS)
    assert "train.trainable: 'k' is no parameter's name" in str(error.value)
    assert "train.frozen: 'heads' is no parameter's name" in str(error.value)
    assert "layers/0/attention/q_norm" in str(error.value)
    with pytest.raises(ConfigError, match="leave nothing to train"):
        trainable.trained_rule(TrainConfig(trainable=("q",), frozen=("layers/*",)), PARAMS)


def test_the_line_about_it_counts_parameters() -> None:
    numbers = PARAMS | {"layers": {"0": {"q": np.zeros(30)}}}
    taken, rest = nested.split(numbers, lambda path: path == "final_norm")
    assert trainable.describe(taken, rest) == "trained: 3 of 43 parameters (6.98%)"


def test_the_step_of_a_part_moves_it_as_the_step_of_all_does(tmp_path: Path) -> None:
    """The gradient is read off one update of plain gradient descent at rate 1."""
    mesh = mesh_of(1, 2, 2)
    rng = np.random.default_rng(0)
    shape = (1, 4, 24)
    batch = Batch(
        tokens=jnp.asarray(rng.integers(0, 160, shape), jnp.int32),
        positions=jnp.tile(jnp.arange(24), (1, 4, 1)),
        segment_ids=jnp.ones(shape, jnp.int32),
        loss_weights=jnp.ones(shape, jnp.float32),
        example_ids=jnp.arange(4).reshape(1, 4, 1),
        source_ids=jnp.zeros((1, 4, 1), jnp.int32),
    )

    def step(**config: Any) -> tuple[dict, dict, Any]:
        with jax.set_mesh(mesh):
            model = open_tiny(tmp_path, "llama", mesh)
            params = nnx.to_pure_dict(model.state)
            rule = trainable.trained_rule(TrainConfig(**config), params)
            trained, frozen = nested.split(params, rule)
            before = jax.device_get(trained)
            state = new_state(trained, optax.sgd(1.0))
            forward = Forward(model.graph, NLL(), mesh, budget=96, head_chunk=64, sources=1)
            run = train_step_fn(forward, optax.sgd(1.0), lambda _: jnp.float32(1), None, state)
            state, metrics = run(state, batch, None, frozen)
            moved = jax.tree.map(np.subtract, before, jax.device_get(state.params))
            return dict(nested.flat(moved)), dict(nested.flat(frozen)), metrics

    every, nothing, metrics = step()
    some, frozen, part = step(trainable=("attention/*",), frozen=("o",))
    assert nothing == {}
    assert {path.rpartition("/")[2] for path in some} == {"q", "k", "v"}
    assert some.keys() | frozen.keys() == every.keys()
    for path, moved in some.items():
        assert np.abs(moved).max() > 0
        np.testing.assert_allclose(moved, every[path], atol=1e-6 * np.abs(every[path]).max())
    assert not any(array.is_deleted() for array in frozen.values())
    np.testing.assert_allclose(part["loss"].value, metrics["loss"].value, rtol=1e-6)
    norm = np.sqrt(sum(float((g**2).sum()) for g in some.values()))
    np.testing.assert_allclose(part["grad_norm"], norm, rtol=1e-5)
