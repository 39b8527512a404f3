"""From the plan to arrays, read ahead by threads: step k is built from the number k alone.

Grain's random-access data set runs over step numbers, so its iterator has no state worth saving: a
run resumes at any step, on any number of processes, each of which builds only its own rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from posttrain.data.plan import Plan
from posttrain.types import Batch, Example


@runtime_checkable
class Examples(Protocol):
    """What the pipeline reads: a cache, from several threads at once."""

    def read(self, ids: Sequence[int], /) -> list[Example]: ...


def make_rows(
    examples: Examples,
    layout: Int[np.ndarray, "*rows S"],
    source_ids: Int[np.ndarray, " N"],
    seq_len: int,
) -> Batch:
    """The arrays of the rows whose segments' example ids are `layout` (-1: no segment).

    Segments lie one after another from position 0, the padding is at the end. The first token of a
    segment has nothing before it to be predicted from: its weight is 0 whatever the example says.
    All examples are asked for at once: a cache reads many together faster than one by one.
    """
    shape = (*layout.shape[:-1], seq_len)
    tokens, positions, segments = (
        np.zeros((layout[..., 0].size, seq_len), np.int32) for _ in "tps"
    )
    weights = np.zeros(tokens.shape, np.float32)
    read = iter(examples.read(layout[layout >= 0].tolist()))
    for row, members in enumerate(layout.reshape(-1, layout.shape[-1])):
        start = 0
        for segment, i in enumerate(members[members >= 0].tolist(), 1):
            example = next(read)
            end = start + len(example.tokens)
            if end > seq_len:
                raise ValueError(
                    f"example {i} has {len(example.tokens)} tokens, more than the plan was made "
                    "for: the cache has changed under the run"
                )
            tokens[row, start:end] = example.tokens
            weights[row, start + 1 : end] = example.loss_weights[1:]
            positions[row, start:end] = np.arange(end - start)
            segments[row, start:end] = segment
            start = end
    return Batch(
        tokens=tokens.reshape(shape),
        positions=positions.reshape(shape),
        segment_ids=segments.reshape(shape),
        loss_weights=weights.reshape(shape),
        example_ids=layout,
        source_ids=np.where(layout >= 0, source_ids[layout], -1).astype(np.int32),
    )


class Pipeline:
    """Iterates over Batches of numpy arrays [A, B_local, ...], steps `start` .. plan.steps - 1.

    `rows` are the indices along B that this process needs (all by default), the same in each
    micro-batch. An error while a step is built is raised when that step is asked for, as it was,
    with a note that names the step; the data never just ends early. Use as a context manager or
    call close(). `seconds_waited` counts the time that the caller spent waiting for a batch.
    """

    def __init__(
        self,
        examples: Examples,
        plan: Plan,
        *,
        start: int = 0,
        rows: Sequence[int] | None = None,
    ):
        import grain  # here, since it imports jax

        if not 0 <= start <= plan.steps:
            raise ValueError(f"cannot start at step {start}: the plan has {plan.steps} steps")
        self.seconds_waited = 0.0
        self.next_step = start
        self._closed = False
        self._examples, self._plan = examples, plan
        self._rows = None if rows is None else np.asarray(rows, np.int64)
        threads = plan.batch.threads
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=plan.batch.prefetch if threads else 0
        )
        steps = grain.MapDataset.range(start, plan.steps)
        self._batches = iter(steps.map(self._build).to_iter_dataset(options))

    def __iter__(self) -> Pipeline:
        return self

    def __next__(self) -> Batch:
        if self.next_step == self._plan.steps:
            raise StopIteration
        if self._closed:
            raise RuntimeError("the pipeline is closed")
        before = time.perf_counter()
        outcome = next(self._batches, None)
        self.seconds_waited += time.perf_counter() - before
        if outcome is None:
            outcome = RuntimeError(f"the loader ended before step {self.next_step} of the plan")
        if isinstance(outcome, Exception):
            self.close()
            if isinstance(outcome, StopIteration):
                raise RuntimeError(f"{outcome!r} at step {self.next_step}") from outcome
            raise outcome
        self.next_step += 1
        return outcome

    def close(self) -> None:
        """Stops the reading threads."""
        self._closed = True
        self._batches.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _build(self, step: int) -> Batch | Exception:
        """The step's batch, or the error: an IndexError or StopIteration that went through the
        iterators between here and the caller would be taken for the end of the data."""
        try:
            layout = self._plan.layout(step)
            if self._rows is not None:
                layout = layout[:, self._rows]
            source_ids = self._plan.index.source_ids
            return make_rows(self._examples, layout, source_ids, self._plan.seq_len)
        except Exception as error:
            error.add_note(f"while the batch of step {step} was built")
            return error
