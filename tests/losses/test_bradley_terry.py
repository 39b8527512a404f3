"""Bradley-Terry against its formula in float64, and extremes that merge as their values would."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from posttrain.losses.bradley_terry import BradleyTerry
from posttrain.metrics import flatten
from posttrain.types import Batch, Extremes, Terms, TokenOutputs

B, S, PAIRS = 6, 4, 9
LOSSES = [BradleyTerry(), BradleyTerry(centering=0.05)]


def make(seed: int = 0, pairs: range = range(PAIRS), wide: float = 3.0) -> tuple[Batch, jax.Array]:
    """(batch, scores [B, S]): sides anywhere, more segments than there are sides; `pairs` alone are
    of this batch, the same ones at the same places whatever the others are."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(B * S)[: 2 * PAIRS]
    margins, scores = rng.uniform(0, 2, PAIRS), rng.normal(0, wide, B * S)
    pair_ids, chosen = np.full(B * S, -1), np.zeros(B * S, bool)
    asked, sources = np.zeros(B * S), np.full(B * S, -1)
    for number, pair in enumerate(pairs):
        both = places[2 * pair : 2 * pair + 2]
        pair_ids[both], asked[both], sources[both] = number, margins[pair], pair % 2
        chosen[both[0]] = True
    scores = np.where(pair_ids >= 0, scores, 0)
    zeros = np.zeros((B, 1), np.int32)

    def of(x, dtype):
        return jnp.asarray(x.reshape(B, S).astype(dtype))

    batch = Batch(
        tokens=zeros, positions=zeros, segment_ids=zeros, loss_weights=zeros,
        example_ids=of(pair_ids, np.int32), source_ids=of(sources, np.int32),
        pair_ids=of(pair_ids, np.int32), chosen=of(chosen, bool), margins=of(asked, np.float32),
    )  # fmt: skip
    return batch, of(scores, np.float32)


def by_formula(loss: BradleyTerry, batch: Batch, scores: np.ndarray) -> dict[str, np.ndarray]:
    """Touvron et al. 2023 eq. 2 and Eisenstein et al. 2023 eq. 2, pair by pair."""
    ids, chosen = np.asarray(batch.pair_ids), np.asarray(batch.chosen)
    found: dict[str, list[float]] = {"loss": [], "chosen": [], "rejected": []}
    for pair in range(ids.max() + 1):
        (good,), (bad,) = (scores[(ids == pair) & (chosen == side)] for side in (True, False))
        margin = float(np.asarray(batch.margins)[(ids == pair) & chosen][0])
        value = -np.log(1 / (1 + np.exp(-(good - bad - margin))))
        found["loss"].append(value + loss.centering * (good + bad) ** 2)
        found["chosen"].append(good)
        found["rejected"].append(bad)
    return {name: np.array(values) for name, values in found.items()}


def mean(terms: Terms) -> jax.Array:
    return (terms.values * terms.weights).sum() / terms.weights.sum()


@pytest.mark.parametrize("loss", LOSSES, ids=["plain", "centred"])
def test_loss_and_metrics_are_the_formula(loss: BradleyTerry) -> None:
    for seed in range(5):
        batch, scores = make(seed)
        want = by_formula(loss, batch, np.asarray(scores, np.float64))
        terms = loss(TokenOutputs(scores=scores), batch)
        real = np.asarray(terms.weights) > 0
        assert real.sum() == PAIRS
        np.testing.assert_allclose(np.asarray(terms.values)[real], want["loss"], rtol=2e-6)
        assert np.asarray(terms.source_ids)[real].tolist() == [p % 2 for p in range(PAIRS)]
        apart, both = want["chosen"] - want["rejected"], [want["chosen"], want["rejected"]]
        assert flatten(terms.metrics, []) == pytest.approx(
            {
                "accuracy": (apart > 0).mean(),
                "margin": apart.mean(),
                "mean_reward": np.mean(both),
                "min_reward": np.min(both),
                "max_reward": np.max(both),
            },
            rel=2e-5,
        )


@pytest.mark.parametrize("loss", LOSSES, ids=["plain", "centred"])
def test_gradient_is_the_formulas_slope(loss: BradleyTerry) -> None:
    batch, scores = make()
    found = np.asarray(jax.grad(lambda x: mean(loss(TokenOutputs(scores=x), batch)))(scores))
    exact, step = np.asarray(scores, np.float64), 1e-5
    for b, s in np.ndindex(B, S):
        nudge = np.zeros((B, S))
        nudge[b, s] = step
        up, down = (by_formula(loss, batch, exact + sign * nudge)["loss"] for sign in (1, -1))
        slope = (up - down).mean() / (2 * step)
        assert found[b, s] == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_rewards_far_apart_cost_no_digits_and_no_infinity() -> None:
    batch, scores = make(wide=300.0)
    values = BradleyTerry()(TokenOutputs(scores=scores), batch).values[:PAIRS]
    ids, chosen = np.asarray(batch.pair_ids), np.asarray(batch.chosen)
    sides = [np.asarray(scores)[(ids == p) & (chosen == side)][0] for p in range(PAIRS)
             for side in (True, False)]  # fmt: skip
    margins = [np.asarray(batch.margins)[ids == p][0] for p in range(PAIRS)]
    apart = np.array(sides[::2], np.float64) - sides[1::2] - margins
    np.testing.assert_allclose(values, np.logaddexp(0, -apart), rtol=1e-5, atol=1e-30)


def test_parts_of_a_batch_merge_to_the_whole() -> None:
    whole, scores = make()
    want = flatten(BradleyTerry()(TokenOutputs(scores=scores), whole).metrics, [])
    parts = [make(pairs=range(4)), make(pairs=range(4, PAIRS))]
    one, other = (BradleyTerry()(TokenOutputs(scores=s), batch).metrics for batch, s in parts)
    assert flatten({k: one[k] + other[k] for k in one}, []) == pytest.approx(want, rel=1e-6)


def test_a_micro_batch_without_pairs_adds_nothing() -> None:
    batch, scores = make()
    none = jnp.full_like(batch.pair_ids, -1)
    empty = dataclasses.replace(batch, pair_ids=none, chosen=jnp.zeros_like(batch.chosen))
    terms = BradleyTerry(centering=1.0)(TokenOutputs(scores=scores), empty)
    assert not terms.weights.any()
    assert flatten(terms.metrics, []) == {}
    whole = BradleyTerry(centering=1.0)(TokenOutputs(scores=scores), batch).metrics
    both = {name: terms.metrics[name] + whole[name] for name in whole}
    assert flatten(both, []) == flatten(whole, [])


def test_extremes_of_a_value_that_is_no_number_say_so() -> None:
    found = Extremes(jnp.float32(1), jnp.float32(2)) + Extremes(jnp.float32("nan"), jnp.float32(3))
    assert np.isnan(found.low)
    assert found.high == 3


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValidationError):
        BradleyTerry(centering=-0.1)
