"""A plan of pairs: each once an epoch, both sides in one micro-batch, whatever the layout."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.config import ConfigError
from posttrain.data.config import SourceConfig
from posttrain.data.pipeline import pair_numbers
from posttrain.data.plan import BatchConfig, Plan
from tests.data.test_plan import FakeIndex

SEQ_LEN = 64


def make_pairs(n: int, seed: int = 0, longest: int = SEQ_LEN, sources: int = 1) -> FakeIndex:
    """n pairs whose sides are 2 to `longest` tokens: many do not fit a row together."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, 2 * n).astype(np.int32)
    return FakeIndex(
        lengths,
        rng.integers(1, lengths).astype(np.int32),
        np.repeat(rng.integers(0, sources, n), 2).astype(np.int32),
        [f"s{i}" for i in range(sources)],
        sides=2,
    )


def make_plan(index: FakeIndex, shards: int = 1, **batch) -> Plan:
    batch = {"examples": 8} | batch
    return Plan(index, BatchConfig(**batch), seq_len=SEQ_LEN, seed=3, epochs=2, batch_shards=shards)


def pairs_of(micro: np.ndarray) -> list[int]:
    """The pairs of a micro-batch's layout, sorted; both sides must be there, equally often."""
    ids = micro[micro >= 0]
    chosen, rejected = np.sort(ids[ids % 2 == 0]), np.sort(ids[ids % 2 == 1])
    assert (chosen + 1).tolist() == rejected.tolist()
    return (chosen // 2).tolist()


def step_sets(plan: Plan) -> list[list[int]]:
    return [
        sorted(pair for micro in plan.layout(k) for pair in pairs_of(micro))
        for k in range(plan.steps)
    ]


def test_random_plans_hold_every_pair_once_an_epoch_and_keep_their_budgets() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        n, size = int(rng.integers(1, 120)), int(rng.integers(1, 20))
        index = make_pairs(n, seed=int(rng.integers(1000)))
        plan = make_plan(
            index,
            shards=int(rng.integers(1, 5)),
            examples=size,
            accumulate=int(rng.integers(1, 5)),
            packing=str(rng.choice(["best_fit", "none"])),
            order=str(rng.choice(["shuffle", "sequential"])),
        )
        assert plan.steps_per_epoch == -(-n // size)
        assert plan.micro_rows % plan.batch_shards == 0
        seen: dict[int, list[int]] = {}
        most, tokens, used = 0, 0, 0
        for step, pairs in enumerate(step_sets(plan)):
            seen.setdefault(plan.epoch_of(step)[0], []).extend(pairs)
            layout = plan.layout(step)
            assert layout.shape == (plan.batch.accumulate, plan.micro_rows, plan.max_segments)
            assert sorted(plan.examples(step)) == sorted(layout[layout >= 0])
            lengths = np.where(layout >= 0, index.lengths[layout], 0).sum(-1)
            trained = np.where(layout >= 0, index.trained[layout], 0).sum(-1)
            assert lengths.max() <= SEQ_LEN
            by_shard = trained.reshape(plan.batch.accumulate, plan.batch_shards, -1).sum(-1)
            most = max(most, int(by_shard.max()))
            tokens, used = tokens + lengths.sum(), used + (layout >= 0).any(-1).sum()
        assert [sorted(pairs) for pairs in seen.values()] == [list(range(n))] * 2
        assert plan.head_budget() == most
        assert plan.efficiency == pytest.approx(tokens / (plan.steps * plan.rows * SEQ_LEN))
        assert plan.fill == pytest.approx(tokens / (used * SEQ_LEN))


def test_accumulation_mesh_and_packing_change_no_step() -> None:
    index = make_pairs(90)
    plans = [
        make_plan(index, shards=shards, accumulate=a, packing=packing)
        for a, shards, packing in [
            (1, 1, "best_fit"), (4, 1, "best_fit"), (1, 8, "none"), (3, 2, "best_fit"),
            (16, 1, "best_fit"),
        ]
    ]  # fmt: skip
    want = step_sets(plans[0])
    assert all(step_sets(plan) == want for plan in plans)


def test_micro_batches_have_about_the_same_tokens() -> None:
    index = make_pairs(400)
    plan = make_plan(index, examples=40, accumulate=4)
    for step in range(plan.steps):
        layout = plan.layout(step)
        tokens = np.where(layout >= 0, index.lengths[layout], 0).sum((1, 2))
        assert tokens.max() < 1.03 * tokens.min()


def test_sequential_steps_are_slices_and_shuffled_ones_are_even() -> None:
    """The rows of a step are what the largest step needs: uneven steps are empty rows."""
    index = make_pairs(200)
    sequential = make_plan(index, order="sequential")
    assert step_sets(sequential)[:2] == [list(range(8)), list(range(8, 16))]
    shuffled = make_plan(index)
    tokens = index.lengths.reshape(-1, 2).sum(1)
    spread = [
        np.std([tokens[pairs].sum() for pairs in step_sets(plan)])
        for plan in (sequential, shuffled)
    ]
    assert spread[1] < 0.4 * spread[0]
    assert shuffled.efficiency > 1.15 * sequential.efficiency
    first, second = step_sets(shuffled)[:25], step_sets(shuffled)[25:]
    together = {tuple(pairs) for pairs in first} & {tuple(pairs) for pairs in second}
    assert not together  # another epoch, other steps


def test_pairs_repeat_by_their_sources() -> None:
    index = make_pairs(60, sources=2)
    sources = {"s0": SourceConfig(path="x"), "s1": SourceConfig(path="x", repeats=3)}
    plan = Plan(index, BatchConfig(examples=50, accumulate=2), seq_len=SEQ_LEN, seed=0, epochs=1,
                sources=sources)  # fmt: skip
    times = np.bincount([pair for pairs in step_sets(plan) for pair in pairs])
    assert (times == np.where(index.source_ids[::2] == 1, 3, 1)).all()
    pairs = int((index.source_ids == 1).sum()) // 2
    assert f"s1: {pairs} pairs, seen 3 times an epoch" in plan.describe()
    assert "of 50 pairs in" in plan.describe()


def test_numbers_join_the_sides_of_a_pair_and_are_dense() -> None:
    sources = {"s0": SourceConfig(path="x", repeats=2.5)}  # some pairs twice in a step
    plan = Plan(make_pairs(30), BatchConfig(examples=40, accumulate=3), seq_len=SEQ_LEN, seed=0,
                epochs=1, batch_shards=2, sources=sources)  # fmt: skip
    twice = 0
    for step in range(plan.steps):
        layout = plan.layout(step)
        for micro, numbers in zip(layout, pair_numbers(layout), strict=True):
            assert ((numbers >= 0) == (micro >= 0)).all()
            pairs = pairs_of(micro)
            twice += len(pairs) - len(set(pairs))
            assert sorted(numbers[numbers >= 0]) == np.repeat(np.arange(len(pairs)), 2).tolist()
            for number in range(len(pairs)):
                first, second = sorted(micro[numbers == number].tolist())
                assert (first % 2, second) == (0, first + 1)
    assert twice > 5


def test_a_step_of_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch\.rows is 4: .* set batch\.examples"):
        make_plan(make_pairs(5), examples=None, rows=4)


def test_a_side_without_a_trained_token_is_refused() -> None:
    index = make_pairs(20)
    index.trained[13] = 0
    with pytest.raises(ValueError, match="pair 6: its rejected side has no trained token"):
        make_plan(index)
