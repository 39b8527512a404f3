"""Top-k and top-p against a sort in plain Python; draws against their probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.sampling.sampler import Choice, choose, filter_logits


def kept(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """The definition: walk down from the most probable token."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    p = np.exp(logits[order] - logits[order].max())
    p /= p.sum()
    found, total = set(), 0.0
    for i, share in zip(order, p, strict=True):
        if found and total >= top_p:
            break
        found.add(i)
        total += share
    return found


@pytest.mark.parametrize("top_k", [0, 1, 3, 30, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_filter_keeps_what_the_definition_keeps(top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=(6, 30)).astype(np.float32) * 2
    choice = Choice(np.float32(1), np.int32(top_k), np.float32(top_p))
    found = np.asarray(filter_logits(jnp.asarray(logits), choice))
    for row, got in zip(logits, found, strict=True):
        finite = set(np.flatnonzero(np.isfinite(got)).tolist())
        assert finite == kept(row.astype(np.float64), top_k, top_p)
        assert all(got[i] == row[i] for i in finite)


def test_draws_follow_the_tempered_probabilities() -> None:
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    n, temperature = 20_000, 2.0
    rows = jnp.tile(logits, (n, 1))
    choice = Choice(np.float32(temperature), np.int32(3), np.float32(1))
    steps = jnp.zeros(n, jnp.int32)
    drawn = choose(rows, choice, jax.random.key(0), steps, greedy=False, filtered=True)
    want = np.sqrt([0.5, 0.3, 0.15, 0])  # temperature 2: square roots, renormalised
    found = np.bincount(np.asarray(drawn), minlength=4) / n
    np.testing.assert_allclose(found, want / want.sum(), atol=0.015)
    assert found[3] == 0
