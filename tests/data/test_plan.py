"""The plan: every example once an epoch, whatever the mesh; budgets that hold; refusals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from pydantic import ValidationError

from posttrain.data.config import SourceConfig
from posttrain.data.plan import BatchConfig, Plan


@dataclass
class FakeIndex:
    lengths: np.ndarray
    trained: np.ndarray
    source_ids: np.ndarray
    source_names: list[str]
    sides: int = 1


def make_index(n: int, seed: int = 0, longest: int = 60, sources: int = 1) -> FakeIndex:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, n).astype(np.int32)
    return FakeIndex(
        lengths,
        rng.integers(1, lengths).astype(np.int32),
        rng.integers(0, sources, n).astype(np.int32),
        [f"s{i}" for i in range(sources)],
    )


def step_sets(plan: Plan) -> list[list[int]]:
    """The ids in each step's layout, sorted."""
    return [sorted(ids[ids >= 0].tolist()) for ids in map(plan.layout, range(plan.steps))]


def random_plan(rng: np.random.Generator, **length) -> Plan:
    """A plan of random sizes; of up to 3 epochs, or of the length given."""
    size = {("rows", "examples")[rng.integers(2)]: int(rng.integers(1, 20))}
    batch = {
        "packing": str(rng.choice(["best_fit", "none"])),
        "order": str(rng.choice(["shuffle", "sequential"])),
        "accumulate": int(rng.integers(1, 4)),
    }
    index = make_index(int(rng.integers(1, 200)), int(rng.integers(1000)))
    return Plan(
        index,
        BatchConfig(**size, **batch),
        seq_len=64,
        seed=int(rng.integers(100)),
        batch_shards=int(rng.integers(1, 5)),
        **(length or {"epochs": int(rng.integers(1, 4))}),
    )


def test_epochs_are_counted_in_their_own_steps():
    """Epochs of a mixture differ in length: step / steps of the first is not what was seen."""
    index = make_index(200, sources=2)
    sources = {name: SourceConfig(path="x", weight=w) for name, w in (("s0", 1.0), ("s1", 0.71))}
    plan = Plan(index, BatchConfig(rows=4), seq_len=64, seed=0, epochs=9, sources=sources)
    ends = np.flatnonzero(np.diff([plan.epoch_of(k)[0] for k in range(plan.steps)]))
    assert len({*np.diff(ends)}) > 1
    assert [plan.epochs_after(k) for k in ends.tolist()] == list(range(1, 9))
    assert plan.epochs_after(plan.steps - 1) == 9
    assert plan.epochs_after(0) == 1 / plan.steps_per_epoch


def test_every_example_exactly_once_an_epoch_and_shapes_are_static():
    rng = np.random.default_rng(0)
    for _ in range(60):
        plan = random_plan(rng)
        seen: dict[int, list[int]] = {}
        for step in range(plan.steps):
            layout = plan.layout(step)
            assert layout.dtype == np.int32
            assert layout.shape == (plan.batch.accumulate, plan.micro_rows, plan.max_segments)
            assert plan.rows == plan.batch.accumulate * plan.micro_rows
            assert plan.micro_rows % plan.batch_shards == 0
            for row in layout.reshape(-1, plan.max_segments):
                used = row[row >= 0]
                assert (row[: len(used)] == used).all()  # segments first, then -1
                assert plan.index.lengths[used].sum() <= plan.seq_len
                assert plan.batch.packing == "best_fit" or len(used) <= 1
            seen.setdefault(plan.epoch_of(step)[0], []).extend(layout[layout >= 0].tolist())
        assert len(seen) == plan.steps / plan.steps_per_epoch or plan.batch.rows
        for ids in seen.values():
            assert sorted(ids) == list(range(len(plan.index.lengths)))


def test_accumulation_and_mesh_change_no_step():
    index = make_index(150)
    for size in [{"rows": 8}, {"examples": 16}]:
        plans = [
            Plan(index, BatchConfig(accumulate=a, **size), seq_len=64, seed=1, epochs=2,
                 batch_shards=shards)
            for a, shards in [(1, 1), (4, 1), (1, 8), (2, 4), (3, 5)]
        ]  # fmt: skip
        want = step_sets(plans[0])
        assert all(step_sets(plan) == want for plan in plans)
        assert all(sorted(p.examples(k)) == want[k] for p in plans for k in range(p.steps))


def test_a_step_of_examples_is_a_slice_of_the_order_packed_or_not():
    index = make_index(50)
    for packing in ["best_fit", "none"]:
        batch = BatchConfig(examples=8, order="sequential", packing=packing)
        plan = Plan(index, batch, seq_len=64, seed=0, epochs=1)
        assert step_sets(plan) == [list(range(k, min(k + 8, 50))) for k in range(0, 50, 8)]
    index = make_index(50, longest=30)
    packed = [BatchConfig(examples=8, packing=p) for p in ("best_fit", "none")]
    one, other = (Plan(index, b, seq_len=64, seed=4, epochs=2) for b in packed)
    assert step_sets(one) == step_sets(other)
    assert one.rows < other.rows == 8


def test_sequential_unpacked_rows_are_the_data_in_order():
    plan = Plan(make_index(20), BatchConfig(rows=8, packing="none", order="sequential"),
                seq_len=64, seed=0, epochs=1)  # fmt: skip
    assert plan.layout(1)[0, :, 0].tolist() == list(range(8, 16))
    assert plan.layout(2)[0, :, 0].tolist() == [16, 17, 18, 19, -1, -1, -1, -1]


def test_sequential_packed_rows_come_by_their_first_example():
    plan = Plan(make_index(120), BatchConfig(rows=4, order="sequential"), seq_len=64, seed=0,
                epochs=1)  # fmt: skip
    firsts = [row[0] for k in range(plan.steps) for row in plan.layout(k)[0] if row[0] >= 0]
    assert firsts == sorted(firsts)


def test_shuffled_rows_are_not_sorted_by_length():
    """Packing starts with the longest examples: rows left so would make batches of like lengths."""
    index = make_index(4000)
    plan = Plan(index, BatchConfig(rows=32), seq_len=64, seed=0, epochs=1)
    longest = [index.lengths[plan.examples(k)].max() for k in range(plan.steps)]
    counts = [len(plan.examples(k)) for k in range(plan.steps - 1)]
    assert min(longest[:-1]) >= 58
    assert max(counts) < 2 * min(counts)
    assert abs(np.corrcoef(np.arange(len(counts)), counts)[0, 1]) < 0.35


def test_epochs_differ_and_seeds_differ():
    plans = [
        Plan(make_index(200), BatchConfig(rows=4), seq_len=64, seed=s, epochs=2) for s in (0, 0, 1)
    ]
    assert step_sets(plans[0]) == step_sets(plans[1])
    assert step_sets(plans[0]) != step_sets(plans[2])
    assert plans[0].examples(0).tolist() != plans[0].examples(plans[0].steps_per_epoch).tolist()


def test_steps_may_stop_inside_an_epoch_and_are_a_prefix_of_the_longer_run():
    index, batch = make_index(100), BatchConfig(examples=8)
    whole = Plan(index, batch, seq_len=64, seed=0, epochs=3)
    assert whole.steps_per_epoch == 13
    assert whole.steps == 39
    for steps in [1, 12, 13, 14, 30]:
        part = Plan(index, batch, seq_len=64, seed=0, steps=steps)
        assert part.steps == steps
        assert step_sets(part) == step_sets(whole)[:steps]
        assert part.head_budget() <= whole.head_budget()
    assert whole.epoch_of(12) == (0, 12)
    assert whole.epoch_of(13) == (1, 0)
    for step in (-1, 39):
        with pytest.raises(IndexError):
            whole.layout(step)


def test_the_head_budget_is_the_largest_shard_and_is_balanced():
    rng = np.random.default_rng(5)
    for _ in range(40):
        plan = random_plan(rng)
        loads = []
        for step in range(plan.steps):
            ids = plan.layout(step)
            trained = np.where(ids >= 0, plan.index.trained[ids], 0).sum(-1)
            loads.append(trained.reshape(plan.batch.accumulate, plan.batch_shards, -1).sum(-1))
        assert plan.head_budget() == np.max(loads)

    index = make_index(2000)  # trained counts from 1 to 59 per example
    plan = Plan(index, BatchConfig(rows=64, accumulate=2), seq_len=64, seed=0, epochs=1,
                batch_shards=4)  # fmt: skip
    mean = max(index.trained[plan.examples(k)].sum() for k in range(plan.steps)) / 8
    assert mean <= plan.head_budget() < 1.03 * mean
    naive = max(
        index.trained[plan.examples(k)[i : i + len(plan.examples(k)) // 8]].sum()
        for k in range(plan.steps)
        for i in range(0, len(plan.examples(k)), len(plan.examples(k)) // 8)
    )
    assert naive > 1.1 * mean  # what rows taken as they come would have needed


def test_efficiency_and_fill_are_what_the_layouts_hold():
    rng = np.random.default_rng(6)
    for steps in [None, 1, 2, 7, 40] * 8:
        plan = random_plan(rng, **({"steps": steps} if steps else {}))
        layouts = np.concatenate([plan.layout(k).reshape(plan.rows, -1) for k in range(plan.steps)])
        tokens = np.where(layouts >= 0, plan.index.lengths[layouts], 0).sum()
        used = (layouts >= 0).any(-1).sum()
        assert plan.efficiency == pytest.approx(tokens / (layouts.shape[0] * plan.seq_len))
        assert plan.fill == pytest.approx(tokens / (used * plan.seq_len))
        assert plan.max_segments == (layouts >= 0).sum(-1).max()


def test_sources_repeat_by_weight_or_number():
    index = make_index(300, sources=2)
    sizes = np.bincount(index.source_ids)
    sources = {name: SourceConfig(path="x", weight=w) for name, w in (("s0", 3.0), ("s1", 1.0))}
    plan = Plan(index, BatchConfig(examples=10), seq_len=64, seed=0, epochs=1, sources=sources)
    seen = np.concatenate([plan.examples(k) for k in range(plan.steps)])
    share = (index.source_ids[seen] == 0).mean()
    assert share == pytest.approx(0.75, abs=0.01)
    assert plan.repeats["s1"] == 1
    assert plan.repeats["s0"] == pytest.approx(3 * sizes[1] / sizes[0])
    assert f"s1: {sizes[1]} examples, seen 1 times an epoch" in plan.describe()

    sources = {"s1": SourceConfig(path="x", repeats=2), "s0": SourceConfig(path="x")}
    plan = Plan(index, BatchConfig(rows=10), seq_len=64, seed=0, epochs=1, sources=sources)
    times = np.bincount(np.concatenate([plan.examples(k) for k in range(plan.steps)]))
    assert (times == np.where(index.source_ids == 1, 2, 1)).all()


@pytest.mark.parametrize("sizes", [{}, {"rows": 1, "examples": 1}, {"rows": 0}])
def test_a_step_has_one_size(sizes):
    with pytest.raises(ValidationError):
        BatchConfig(**sizes)


def test_runs_that_cannot_be_planned_are_refused():
    index, batch = make_index(10), BatchConfig(rows=2)
    for length in [{}, {"epochs": 1, "steps": 1}, {"steps": 0}, {"epochs": 0}]:
        with pytest.raises(ValueError, match="epochs"):
            Plan(index, batch, seq_len=64, seed=0, **length)
    with pytest.raises(ValueError, match="raise seq_len"):
        Plan(index, batch, seq_len=int(index.lengths.max()) - 1, seed=0, epochs=1)
    with pytest.raises(ValueError, match="no examples"):
        Plan(make_index(0), batch, seq_len=64, seed=0, epochs=1)


def test_a_step_that_trains_on_nothing_is_refused_before_the_run():
    index = make_index(40)
    batch = BatchConfig(examples=8, order="sequential")
    index.trained[16:23] = 0
    Plan(index, batch, seq_len=64, seed=0, epochs=1)
    index.trained[23] = 0
    with pytest.raises(ValueError, match=r"step 2 trains on nothing: none of its 8 .*sources: s0"):
        Plan(index, batch, seq_len=64, seed=0, epochs=1)
    assert Plan(index, batch, seq_len=64, seed=0, steps=2).steps == 2
