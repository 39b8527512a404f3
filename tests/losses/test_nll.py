"""The supervised loss against its formula in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.losses.nll import NLL
from posttrain.types import Batch, Mean, Terms, TokenOutputs

RNG = np.random.default_rng(0)
B, T = 3, 7
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
SOURCES = np.array([[0, 2], [2, -1], [-1, -1]])
WEIGHTS = np.where(RNG.random((B, T)) < 0.6, RNG.random((B, T)), 0.0) * (SEGMENTS > 0)
LOGPS = -RNG.random((B, T)) * 5
ENTROPY, CORRECT = RNG.random((B, T)) * 3, (RNG.random((B, T)) < 0.5).astype(float)


@pytest.fixture(scope="module")
def outputs() -> TokenOutputs:
    def as_jax(x):
        return jnp.asarray(x, jnp.float32)

    return TokenOutputs(as_jax(LOGPS), as_jax(ENTROPY), as_jax(CORRECT))


@pytest.fixture(scope="module")
def batch() -> Batch:
    zeros = jnp.zeros((B, T), jnp.int32)
    return Batch(
        tokens=zeros,
        positions=zeros,
        segment_ids=jnp.asarray(SEGMENTS, jnp.int32),
        loss_weights=jnp.asarray(WEIGHTS, jnp.float32),
        example_ids=jnp.asarray(SOURCES, jnp.int32),
        source_ids=jnp.asarray(SOURCES, jnp.int32),
    )


def mean(terms: Terms) -> Mean:
    return Mean((terms.values * terms.weights).sum(), terms.weights.sum())


def test_loss_is_the_weighted_mean(outputs: TokenOutputs, batch: Batch) -> None:
    terms = NLL()(outputs, batch)
    loss, metrics = mean(terms), terms.metrics
    np.testing.assert_allclose(loss.value, -(LOGPS * WEIGHTS).sum() / WEIGHTS.sum(), rtol=1e-6)
    trained = WEIGHTS > 0
    np.testing.assert_allclose(metrics["entropy"].value, ENTROPY[trained].mean(), rtol=1e-6)
    np.testing.assert_allclose(
        metrics["mean_token_accuracy"].value, CORRECT[trained].mean(), rtol=1e-6
    )


def test_pitfall_11_no_mean_of_means(outputs: TokenOutputs, batch: Batch) -> None:
    """Halves of unequal weight add up to the whole; the mean of their means is another number."""
    halves = []
    for rows in (slice(0, 1), slice(1, 3)):

        def pick(x, rows=rows):
            return None if x is None else x[rows]

        part = Batch(**{k: pick(v) for k, v in vars(batch).items()})
        halves.append(mean(NLL()(TokenOutputs(*map(pick, vars(outputs).values())), part)))
    whole = mean(NLL()(outputs, batch))
    np.testing.assert_allclose((halves[0] + halves[1]).value, whole.value, rtol=1e-6)
    assert abs((halves[0].value + halves[1].value) / 2 - whole.value) > 1e-3


def test_each_token_has_its_source(outputs: TokenOutputs, batch: Batch) -> None:
    """train/step.py makes the loss by source of it."""
    owner = np.full((B, T), -1)
    for b in range(B):
        for t in range(T):
            if SEGMENTS[b, t]:
                owner[b, t] = SOURCES[b, SEGMENTS[b, t] - 1]
    np.testing.assert_array_equal(NLL()(outputs, batch).source_ids, owner)
