"""A step is its set of pairs: rows, micro-batches, devices and the kind of reference are layout.

Loss, metrics and gradient of the same pairs, laid out in every way, by a tiny model. The gradient
is read off the parameters: one update of plain gradient descent at rate 1 subtracts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from posttrain import sharding
from posttrain.data.plan import BatchConfig, Plan
from posttrain.losses.dpo import DPO
from posttrain.losses.nll import NLL
from posttrain.models.moe import NO_ROUTER, RouterWeights
from posttrain.train.offline import OfflineSource
from posttrain.train.state import new_state
from posttrain.train.step import Forward, eval_step_fn, train_step_fn
from posttrain.types import Example, Extremes
from tests.models.tiny import mesh_of, open_tiny

SEQ_LEN, PAIRS = 48, 10
DPO_LOSS = DPO(beta=0.3, label_smoothing=0.1, nll_weight=0.2)


class FakePairs:
    """Pairs of one prompt and two answers, two thirds of which do not fit a row together, and what
    a reference said: log-probabilities near those of a random model (log 1/160 is -5)."""

    def __init__(self, sides: int = 2, pairs: range = range(PAIRS)):
        rng = np.random.default_rng(0)
        self.examples: list[Example] = []
        self.said: list[np.ndarray] = []
        for pair in range(PAIRS):
            prompt = rng.integers(0, 160, int(rng.integers(2, 14)))
            for _ in range(2):
                answer = rng.integers(0, 160, int(rng.integers(5, SEQ_LEN - 14)))
                logps = rng.uniform(-6, -4, len(answer)).astype(np.float32)
                tokens = np.concatenate([prompt, answer]).astype(np.int32)
                weights = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
                if pair in pairs:
                    self.examples.append(Example(tokens, weights))
                    self.said.append(logps)
        self.lengths = np.array([len(e.tokens) for e in self.examples], np.int32)
        self.trained = np.array([len(logps) for logps in self.said], np.int32)
        self.source_ids = np.repeat(np.array(pairs) % 2, 2).astype(np.int32)
        self.source_names = ["even", "odd"]
        self.sides = sides

    def read(self, ids: Sequence[int]) -> list[Example]:
        return [self.examples[i] for i in ids]


class FakeReference:
    def __init__(self, data: FakePairs):
        self.said = data.said

    def read(self, ids: Sequence[int]) -> list[np.ndarray]:
        return [self.said[i] for i in ids]


def step(
    folder: Path, mesh_sizes: tuple[int, ...], *, loss: Any = DPO_LOSS, data: Any = None,
    live: bool = False, evaluate: bool = False, family: str = "llama",
    router: RouterWeights = NO_ROUTER, **batch: Any,
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """One step over all the data: (metrics, gradient as numpy)."""
    data = data or FakePairs()
    mesh = mesh_of(*mesh_sizes)
    with jax.set_mesh(mesh):
        model = open_tiny(folder, family, mesh)
        params = nnx.to_pure_dict(model.state)
        settings = {"examples": len(data.examples) // data.sides, "order": "sequential"} | batch
        shards = sharding.batch_shards(mesh)
        plan = Plan(data, BatchConfig(**settings), seq_len=SEQ_LEN, seed=0, epochs=1,
                    batch_shards=shards)  # fmt: skip
        forward = Forward(model.graph, loss, mesh, plan.head_budget(), head_chunk=64, sources=2,
                          router=router)  # fmt: skip
        needed = "reference_logps" in loss.needs
        reference = FakeReference(data) if needed and not live else None
        source = OfflineSource(data, plan, mesh, reference=reference)
        given = source.next()
        source.close()
        # a model near the policy, so that its reference is told from the policy itself
        other = jax.tree.map(lambda p: p + 0.02 * jnp.cos(jnp.arange(p.size).reshape(p.shape)),
                             params) if live else None  # fmt: skip
        if evaluate:
            return jax.device_get(eval_step_fn(forward)(params, given, other)), None
        before = jax.device_get(params)
        state = new_state(params, optax.sgd(1.0))
        run = train_step_fn(forward, optax.sgd(1.0), lambda _: jnp.float32(1), None, state)
        state, metrics = run(state, given, other)
        after = jax.device_get(state.params)
        return jax.device_get(metrics), jax.tree.map(np.subtract, before, after)


def assert_same(found: tuple[dict[str, Any], Any], want: tuple[dict[str, Any], Any]) -> None:
    """To float32 rounding: of the loss 1e-6, of a gradient 1e-5 of its tensor's largest entry."""
    assert found[0]["loss"].count == want[0]["loss"].count
    np.testing.assert_allclose(found[0]["loss"].value, want[0]["loss"].value, rtol=1e-6)
    np.testing.assert_allclose(found[0]["grad_norm"], want[0]["grad_norm"], rtol=1e-5)
    for name, value in want[0].items():
        if name == "routing":
            for ours, theirs in zip(*map(jax.tree.leaves, (found[0][name], value)), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        elif isinstance(value, Extremes):
            ends = ((found[0][name].low, value.low), (found[0][name].high, value.high))
            np.testing.assert_allclose(*zip(*ends, strict=True), rtol=1e-5, atol=1e-5)
        elif name not in ("learning_rate", "grad_norm"):
            assert np.array_equal(found[0][name].count, value.count), name
            np.testing.assert_allclose(found[0][name].total, value.total, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def unpacked(folder: Path) -> tuple[dict[str, Any], Any]:
    """One sequence a row, one device, one micro-batch: nothing to get wrong."""
    return step(folder, (1, 1, 1), packing="none")


@pytest.mark.parametrize(
    ("mesh_sizes", "batch"),
    [
        ((1, 1, 1), {}),
        ((2, 4, 1), {}),
        ((1, 2, 2), {"accumulate": 4}),
        ((1, 2, 1), {"accumulate": 12}),  # two micro-batches hold no pair
    ],
)
def test_a_step_of_pairs_is_the_same_however_it_is_laid_out(
    folder: Path,
    unpacked: tuple[dict[str, Any], Any],
    mesh_sizes: tuple[int, int, int],
    batch: dict[str, Any],
) -> None:
    assert unpacked[0]["loss"].count == PAIRS
    assert_same(step(folder, mesh_sizes, **batch), unpacked)


def test_a_live_reference_is_the_same_however_it_is_laid_out(folder: Path) -> None:
    want, _ = step(folder, (1, 1, 1), live=True, evaluate=True, packing="none")
    assert abs(want["rewards/margins"].value) > 0.01  # it is not the policy
    found, _ = step(folder, (1, 2, 1), live=True, accumulate=2)
    for name, value in want.items():
        np.testing.assert_allclose(found[name].total, value.total, rtol=1e-5, atol=1e-5)


def test_the_loss_by_source_is_that_of_its_pairs_alone(
    folder: Path, unpacked: tuple[dict[str, Any], Any]
) -> None:
    found = unpacked[0]["loss_by_source"]
    for source in (0, 1):
        data = FakePairs(pairs=range(source, PAIRS, 2))
        alone, _ = step(folder, (1, 1, 1), data=data, evaluate=True, packing="none")
        assert found.count[source] == alone["loss"].count == PAIRS / 2
        np.testing.assert_allclose(found.total[source], alone["loss"].total, rtol=1e-6)


def test_evaluation_says_what_the_step_says_before_its_update(
    folder: Path, unpacked: tuple[dict[str, Any], Any]
) -> None:
    metrics, _ = step(folder, (1, 2, 1), evaluate=True, accumulate=2)
    for name, want in unpacked[0].items():
        if name not in ("grad_norm", "learning_rate"):
            np.testing.assert_allclose(metrics[name].total, want.total, rtol=1e-5, atol=1e-5)


def test_supervised_steps_have_a_loss_by_source_too(folder: Path) -> None:
    data = FakePairs(sides=1)
    found, _ = step(folder, (1, 2, 1), loss=NLL(), data=data, evaluate=True)
    assert found["loss"].count == data.trained.sum()
    odd = data.trained[data.source_ids == 1].sum()
    assert found["loss_by_source"].count.tolist() == [data.trained.sum() - odd, odd]
    np.testing.assert_allclose(found["loss_by_source"].total.sum(), found["loss"].total, rtol=1e-6)
