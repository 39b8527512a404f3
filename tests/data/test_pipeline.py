"""Arrays of a batch, resumption at any step, processes that see the same data, errors that stay."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from posttrain.data.pipeline import Pipeline, make_rows, pair_numbers
from posttrain.data.plan import BatchConfig, Plan
from posttrain.types import Batch, Example

FIELDS = ["tokens", "positions", "segment_ids", "loss_weights", "example_ids", "source_ids"]


class FakeCache:
    """Example i is tokens 1000*i + (0, 1, 2, ...); every token has a weight, the first one too."""

    def __init__(self, n: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.lengths = rng.integers(2, 31, n).astype(np.int32)
        self.trained = self.lengths - 1
        self.source_ids = (np.arange(n) % 3).astype(np.int32)
        self.source_names = ["a", "b", "c"]
        self.sides = 1

    def read(self, ids) -> list[Example]:
        return [self[i] for i in ids]

    def __getitem__(self, i: int) -> Example:
        n = self.lengths[i]
        return Example(
            (1000 * i + np.arange(n)).astype(np.int32), (0.5 + np.arange(n)).astype(np.float32)
        )


def make_plan(cache: FakeCache, **batch) -> Plan:
    shards = batch.pop("shards", 1)
    batch = {"rows": 8, "threads": 2, "prefetch": 3} | batch
    return Plan(cache, BatchConfig(**batch), seq_len=32, seed=0, epochs=2, batch_shards=shards)


def batches(cache, plan, **kwargs) -> list[Batch]:
    with Pipeline(cache, plan, **kwargs) as pipeline:
        return list(pipeline)


def assert_same(one: Batch, other: Batch) -> None:
    for name in FIELDS:
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right, err_msg=name)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_rows_hold_their_examples_and_nothing_else(packing):
    cache = FakeCache(100)
    plan = make_plan(cache, packing=packing, accumulate=2, shards=2)
    seen = []
    for batch in batches(cache, plan):
        assert batch.tokens.shape == (2, plan.micro_rows, 32)
        assert batch.example_ids.shape == (2, plan.micro_rows, plan.max_segments)
        for a, b in np.ndindex(batch.tokens.shape[:2]):
            start = 0
            for s in range(plan.max_segments):
                i = batch.example_ids[a, b, s]
                assert batch.source_ids[a, b, s] == (i % 3 if i >= 0 else -1)
                if i < 0:
                    assert not (batch.segment_ids[a, b] == s + 1).any()
                    continue
                seen.append(i)
                where = np.flatnonzero(batch.segment_ids[a, b] == s + 1)
                n = cache.lengths[i]
                assert where.tolist() == list(range(start, start + n))  # side by side, whole
                start += n
                assert batch.tokens[a, b, where].tolist() == list(range(1000 * i, 1000 * i + n))
                assert batch.positions[a, b, where].tolist() == list(range(n))
                # The first token is nobody's target, though this cache gives it a weight.
                weights = batch.loss_weights[a, b, where]
                assert weights.tolist() == [0.0] + [t + 0.5 for t in range(1, n)]
            for name in ["tokens", "positions", "segment_ids", "loss_weights"]:
                assert not getattr(batch, name)[a, b, start:].any()
    assert sorted(seen) == sorted([*range(100)] * 2)


def test_trained_tokens_of_a_batch_stay_within_the_budget():
    cache = FakeCache(150)
    plan = make_plan(cache, accumulate=2, shards=2)
    most = 0
    for batch in batches(cache, plan):
        trained = (batch.loss_weights > 0).reshape(2, 2, plan.micro_rows // 2, -1).sum((-1, -2))
        most = max(most, trained.max())
    assert most == plan.head_budget()


def test_dtypes_are_those_of_the_batch():
    batch = batches(FakeCache(9), make_plan(FakeCache(9)))[0]
    for name in FIELDS:
        want = np.float32 if name == "loss_weights" else np.int32
        assert getattr(batch, name).dtype == want


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_see_what_one_sees(processes):
    cache = FakeCache(120)
    plan = make_plan(cache, accumulate=2, shards=4)
    whole = batches(cache, plan)
    per = plan.micro_rows // processes
    parts = [batches(cache, plan, rows=range(p * per, (p + 1) * per)) for p in range(processes)]
    for step, want in enumerate(whole):
        joined = {
            name: np.concatenate([getattr(part[step], name) for part in parts], axis=1)
            for name in FIELDS
        }
        assert_same(Batch(**joined), want)


def test_a_process_reads_only_its_own_rows():
    cache = FakeCache(60)
    plan = make_plan(cache, accumulate=1, shards=2)
    asked = set()

    class Watched(FakeCache):
        def __getitem__(self, i):
            asked.add(i)
            return cache[i]

    mine = batches(Watched(60), plan, rows=[0, 1])
    kept = np.concatenate([batch.example_ids.ravel() for batch in mine])
    assert asked == set(kept[kept >= 0].tolist())
    assert len(asked) < 60


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_resuming_at_any_step_equals_running_through(threads):
    cache = FakeCache(80)
    plan = make_plan(cache, threads=threads)
    whole = batches(cache, plan)
    assert len(whole) == plan.steps
    for start in [0, 1, plan.steps_per_epoch, plan.steps - 1, plan.steps]:
        rest = batches(cache, plan, start=start)
        assert len(rest) == plan.steps - start
        for one, other in zip(rest, whole[start:], strict=True):
            assert_same(one, other)
    with pytest.raises(ValueError, match="cannot start at step"):
        Pipeline(cache, plan, start=plan.steps + 1)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("error", [ValueError, IndexError, StopIteration, OSError])
def test_an_error_in_the_loader_is_not_the_end_of_the_data(threads, error):
    cache = FakeCache(100)
    plan = make_plan(cache, threads=threads)
    bad = int(plan.examples(3)[2])

    class Broken(FakeCache):
        def __getitem__(self, i):
            if i == bad:
                raise error(f"example {i} cannot be read")
            return cache[i]

    expected = RuntimeError if error is StopIteration else error
    with Pipeline(Broken(100), plan) as pipeline:
        with pytest.raises(expected, match=f"example {bad} cannot be read") as caught:
            list(pipeline)
        with pytest.raises(RuntimeError, match="closed"):
            next(pipeline)  # nothing after it, rather than the batch after the missing one
    assert pipeline.next_step == 3
    raised = caught.value.__cause__ if error is StopIteration else caught.value
    assert raised.__notes__ == ["while the batch of step 3 was built"]


def test_a_cache_that_changed_under_the_plan_is_refused():
    cache = FakeCache(20)
    plan = make_plan(cache)
    cache.lengths = cache.lengths + 32
    with pytest.raises(ValueError, match="more than the plan was made for"):
        batches(cache, plan)


def test_waiting_is_counted():
    cache = FakeCache(20)
    plan = make_plan(cache, rows=100, threads=1)

    class Slow(FakeCache):
        def __getitem__(self, i):
            time.sleep(0.01)
            return cache[i]

    with Pipeline(Slow(20), plan) as pipeline:
        next(pipeline)
        waited = pipeline.seconds_waited
    assert 0.1 < waited < 5


def test_batches_are_read_ahead_and_close_ends_it():
    cache = FakeCache(200)
    plan = make_plan(cache, rows=4, prefetch=4)
    asked = []

    class Watched(FakeCache):
        def __getitem__(self, i):
            asked.append(i)
            return cache[i]

    pipeline = Pipeline(Watched(200), plan)
    next(pipeline)
    ahead = plan.examples(3)
    deadline = time.monotonic() + 10
    while not set(ahead.tolist()) <= set(asked) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(ahead.tolist()) <= set(asked)  # nobody has asked for step 3 yet
    assert len(asked) < 0.7 * 2 * 200  # nor is everything read at once
    pipeline.close()
    time.sleep(0.1)
    count, threads = len(asked), threading.active_count()
    time.sleep(0.2)
    assert len(asked) == count
    assert threading.active_count() <= threads


def test_make_rows_takes_rows_of_any_shape():
    cache = FakeCache(5)
    layout = np.array([[2, 0], [-1, -1], [4, -1]], np.int32)
    flat = make_rows(cache, layout, cache.source_ids, 64)
    assert flat.tokens.shape == (3, 64)
    assert not flat.tokens[1].any()
    assert (flat.source_ids == [[2, 0], [-1, -1], [1, -1]]).all()
    assert_same(make_rows(cache, layout[:1], cache.source_ids, 64),
                Batch(*(getattr(flat, name)[:1] for name in FIELDS)))  # fmt: skip


class FakeReference:
    """Of token t of example i, 100 * i + t."""

    def __init__(self, cache: FakeCache):
        self.cache = cache

    def read(self, ids) -> list[np.ndarray]:
        return [100 * i + np.arange(1, self.cache.lengths[i], dtype=np.float32) for i in ids]


def test_pairs_are_numbered_marked_and_carry_what_the_reference_said():
    cache = FakeCache(60)
    cache.sides, cache.source_ids = 2, np.repeat(cache.source_ids[:30], 2)
    plan = make_plan(cache, rows=None, examples=7, accumulate=2, shards=2)
    whole = batches(cache, plan, reference=FakeReference(cache))
    for step, batch in enumerate(whole):
        layout = plan.layout(step)
        np.testing.assert_array_equal(batch.pair_ids, pair_numbers(layout))
        assert batch.pair_ids.dtype == np.int32
        assert batch.reference_logps.dtype == np.float32
        for a, b, s in np.argwhere(layout >= 0):
            i = layout[a, b, s]
            assert batch.chosen[a, b, s] == (i % 2 == 0)
            here = batch.segment_ids[a, b] == s + 1
            said = batch.reference_logps[a, b, here].tolist()
            assert said == [0.0, *(100 * i + np.arange(1, cache.lengths[i]))]
        assert not batch.chosen[layout < 0].any()
        assert not batch.reference_logps[batch.segment_ids == 0].any()
    # a process that builds the second half of the rows gives pairs the same numbers
    half = range(plan.micro_rows // 2, plan.micro_rows)
    for mine, batch in zip(batches(cache, plan, rows=half), whole, strict=True):
        np.testing.assert_array_equal(mine.pair_ids, batch.pair_ids[:, half])
        np.testing.assert_array_equal(mine.chosen, batch.chosen[:, half])
        assert mine.reference_logps is None


def test_a_reference_of_other_data_is_refused():
    cache, other = FakeCache(10), FakeCache(10, seed=1)
    layout = np.arange(10, dtype=np.int32).reshape(10, 1)
    with pytest.raises(ValueError, match=r"example \d has \d+ trained tokens, but the reference"):
        make_rows(cache, layout, cache.source_ids, 32, reference=FakeReference(other))
