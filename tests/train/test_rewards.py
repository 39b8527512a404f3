"""What scores of held-out pairs are worth, against loops and closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.data.plan import BatchConfig, Plan
from posttrain.train.rewards import BINS, gather_scores, judge
from posttrain.types import Batch, Example
from tests.models.tiny import mesh_of


def draw(pairs: int, seed: int = 0, wide: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, wide, 2 * pairs), rng.integers(1, 50, 2 * pairs)


def test_judge_is_a_slow_loop() -> None:
    scores, lengths = draw(500)
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    brier, longer, longer_chosen, unequal = 0.0, 0.0, 0.0, 0
    for p in range(500):
        good, bad = scores[2 * p], scores[2 * p + 1]
        probability = 1 / (1 + np.exp(bad - good))
        confidence = max(probability, 1 - probability)
        bins[int((confidence - 0.5) * 20)].append((float(good > bad), confidence))
        brier += (1 - probability) ** 2 / 500
        if lengths[2 * p] != lengths[2 * p + 1]:
            unequal += 1
            longer += (good > bad) == (lengths[2 * p] > lengths[2 * p + 1])
            longer_chosen += lengths[2 * p] > lengths[2 * p + 1]
    ece = sum(abs(np.mean(b, 0) @ [1, -1]) * len(b) / 500 for b in bins if b)
    x, y = scores - scores.mean(), lengths - lengths.mean()
    assert judge(scores, lengths) == pytest.approx(
        {
            "ece": ece,
            "brier": brier,
            "length_correlation": (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()),
            "prefers_longer": longer / unequal,
            "chosen_longer": longer_chosen / unequal,
        }
    )


def test_calibration_is_0_where_preferences_follow_the_model_and_grows_where_it_boasts() -> None:
    """20,000 pairs whose chosen side is drawn by the model's own probability."""
    rng = np.random.default_rng(0)
    apart = rng.normal(0, 1.5, 20_000)
    flips = rng.random(20_000) > 1 / (1 + np.exp(-apart))
    chosen = np.where(flips, -apart, apart)
    lengths = np.ones(40_000, int)
    honest = judge(np.stack([chosen, 0 * chosen], 1).reshape(-1), lengths)
    boasting = judge(np.stack([4 * chosen, 0 * chosen], 1).reshape(-1), lengths)
    assert honest["ece"] < 0.012
    assert boasting["ece"] > 0.1
    assert boasting["brier"] > honest["brier"] + 0.02
    assert {"length_correlation", "prefers_longer", "chosen_longer"}.isdisjoint(honest)


def test_a_model_that_knows_nothing_is_calibrated_and_one_sure_of_the_wrong_is_not() -> None:
    lengths = np.array([2, 1] * 50)
    nothing = judge(np.zeros(100, np.float32), lengths)
    assert nothing == {"ece": 0, "brier": 0.25, "prefers_longer": 0.5, "chosen_longer": 1.0}
    wrong = judge(np.array([-1e6, 1e6] * 50, np.float32), lengths)
    assert wrong["ece"] == wrong["brier"] == 1
    assert wrong["prefers_longer"] == 0
    assert wrong["length_correlation"] == pytest.approx(-1)


class Fake:
    """Examples whose first token is their own number."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(1, 12, count).astype(np.int32)
        self.trained = self.lengths
        self.source_ids = np.zeros(count, np.int32)
        self.source_names, self.sides = ["one"], 1

    def read(self, ids: Sequence[int]) -> list[Example]:
        return [
            Example(np.full(self.lengths[i], i, np.int32), np.ones(self.lengths[i], np.float32))
            for i in ids
        ]


@pytest.mark.parametrize(("shape", "accumulate"), [((1, 1, 1), 1), ((2, 2, 1), 2)])
def test_each_example_gets_its_own_score_wherever_it_lies(
    shape: tuple[int, int, int], accumulate: int
) -> None:
    mesh, data = mesh_of(*shape), Fake(150)
    shards = shape[0] * shape[1]
    batch = BatchConfig(rows=2 * shards * accumulate, order="sequential", accumulate=accumulate)
    plan = Plan(data, batch, seq_len=16, seed=0, epochs=1, batch_shards=shards)

    @jax.jit
    def run(given: Batch) -> Any:
        number = jnp.arange(1, given.example_ids.shape[-1] + 1)
        here = given.segment_ids[..., None] == number
        return jnp.where(here, given.tokens[..., None], 0).max(2) + 0.5

    with jax.set_mesh(mesh):
        found = gather_scores(data, plan, mesh, run)
    assert plan.steps > 1
    assert found.dtype == np.float32
    assert found.tolist() == [i + 0.5 for i in range(150)]
