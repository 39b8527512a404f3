"""What is asked and what is expected, read from an example's own tokens and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.data.plan import BatchConfig, Plan
from posttrain.train.config import EvalConfig
from posttrain.train.evaluate import HeldOut, expected_of, prompt_of, write_samples
from posttrain.types import Example, Extremes, Mean
from tests.data.test_pipeline import FakeCache, FakeReference
from tests.models.tiny import mesh_of


def example(weights: list[float]) -> Example:
    return Example(np.arange(10, 10 + len(weights), dtype=np.int32), np.float32(weights))


def test_prompt_ends_where_training_begins() -> None:
    two_turns = example([0, 0, 1, 1, 0, 0, 1])
    assert prompt_of(two_turns) == [10, 11]
    assert expected_of(two_turns) == [12, 13]


def test_an_answer_at_the_end_is_expected_whole() -> None:
    last = example([0, 0, 0, 1, 0.5])
    assert prompt_of(last) == [10, 11, 12]
    assert expected_of(last) == [13, 14]


class PairCache(FakeCache):
    """Four pairs; of each example the first half is the prompt."""

    def __init__(self) -> None:
        super().__init__(8)
        self.lengths, self.sides = np.full(8, 6, np.int32), 2

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Example:
        tokens = np.arange(10 * i, 10 * i + 6, dtype=np.int32)
        return Example(tokens, np.float32([0, 0, 0, 1, 1, 1]))


def pairs_held_out(step: Any, reference: Any = None) -> HeldOut:
    cache = PairCache()
    batch = BatchConfig(examples=3, order="sequential", threads=0)
    plan = Plan(cache, batch, seq_len=32, seed=0, epochs=1)
    return HeldOut("pairs", cache, plan, step, reference)


@pytest.mark.parametrize(("samples", "asked"), [(3, [0, 2, 4]), (9, [0, 2, 4, 6])])
def test_of_pairs_the_chosen_answers_are_expected(
    tmp_path: Path, samples: int, asked: list[int]
) -> None:
    words: Any = type("Words", (), {"decode": staticmethod(str)})
    cfg = EvalConfig(samples=samples)
    write_samples(tmp_path / "x.jsonl", pairs_held_out(None), words, cfg, lambda _, p: p, None)
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["expected"] for line in lines] == [
        str([10 * i + 3, 10 * i + 4, 10 * i + 5]) for i in asked
    ]


def test_the_reference_reaches_the_evaluation_cached_or_live() -> None:
    class Halves(FakeReference):
        def read(self, ids: Any) -> list[np.ndarray]:
            return [np.float32([i, i, i]) for i in ids]

    def step(params: Any, batch: Any, live: Any) -> dict[str, Mean]:
        assert (params, live) == ("policy", "reference")
        return {"loss": Mean(batch.reference_logps.sum(), jnp.float32(1))}

    held_out = pairs_held_out(step, Halves(PairCache()))
    found = held_out.measure("policy", mesh_of(1, 1, 1), "reference")
    assert found == {"eval/pairs/loss": 3 * sum(range(8)) / 2}  # 4 pairs are two steps


def test_extremes_of_batches_are_the_sets() -> None:
    steps = iter([Extremes(np.float32(-1), np.float32(5)), Extremes(np.float32(2), np.float32(7))])
    held_out = pairs_held_out(lambda *_: {"kl": next(steps)})
    found = held_out.measure(None, mesh_of(1, 1, 1))
    assert found == {"eval/pairs/min_kl": -1, "eval/pairs/max_kl": 7}
