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


@runtime_checkable
class Reference(Protocol):
    """What a reference model said of the same examples; read from several threads at once."""

    def read(self, ids: Sequence[int], /) -> list[np.ndarray]:
        """Per example, float32 [trained tokens]: their log-probabilities, in order."""
        ...


def make_rows(
    examples: Examples,
    layout: Int[np.ndarray, "*rows S"],
    source_ids: Int[np.ndarray, " N"],
    seq_len: int,
    *,
    pair_ids: Int[np.ndarray, "*rows S"] | None = None,
    reference: Reference | None = None,
) -> Batch:
    """The arrays of the rows whose segments' example ids are `layout` (-1: no segment).

    Segments lie one after another from position 0, the padding is at the end. The first token of a
    segment has nothing before it to be predicted from: its weight is 0 whatever the example says.
    All examples are asked for at once: a cache reads many together faster than one by one.

    With `pair_ids` (see pair_numbers) the examples are sides of pairs: even ids are the chosen
    ones. Without `reference` the batch has no reference_logps. Raises ValueError where an example,
    or what the reference said of it, is not as long as it was.
    """
    shape = (*layout.shape[:-1], seq_len)
    tokens, positions, segments = (
        np.zeros((layout[..., 0].size, seq_len), np.int32) for _ in "tps"
    )
    weights = np.zeros(tokens.shape, np.float32)
    logps = None if reference is None else np.zeros(tokens.shape, np.float32)
    margins = np.zeros((len(tokens), layout.shape[-1]), np.float32)
    labels = np.full(margins.shape, -1, np.int8)
    ids = layout[layout >= 0].tolist()
    read = iter(examples.read(ids))
    said = iter([] if reference is None else reference.read(ids))
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
            margins[row, segment - 1], labels[row, segment - 1] = example.margin, example.label
            if logps is not None:
                _scatter(next(said), weights[row, start:end] > 0, logps[row, start:end], i)
            start = end
    return Batch(
        tokens=tokens.reshape(shape),
        positions=positions.reshape(shape),
        segment_ids=segments.reshape(shape),
        loss_weights=weights.reshape(shape),
        example_ids=layout,
        source_ids=np.where(layout >= 0, source_ids[layout], -1).astype(np.int32),
        pair_ids=pair_ids,
        chosen=None if pair_ids is None else (layout >= 0) & (layout % 2 == 0),
        reference_logps=None if logps is None else logps.reshape(shape),
        labels=labels.reshape(layout.shape),
        margins=None if pair_ids is None else margins.reshape(layout.shape),
    )


def _scatter(values: np.ndarray, trained: np.ndarray, out: np.ndarray, example: int) -> None:
    """The reference's values to the trained tokens' places."""
    if len(values) != (count := int(trained.sum())):
        raise ValueError(
            f"example {example} has {count} trained tokens, but the reference's log-probabilities "
            f"are of {len(values)}: they belong to other data; remove them, to be made again"
        )
    out[trained] = values


def pair_numbers(layout: Int[np.ndarray, "A B S"]) -> Int[np.ndarray, "A B S"]:
    """int32: which pair of its micro-batch each segment is a side of, from 0; -1: no segment.

    From the whole layout, of which a process builds a part: both sides have the same number
    wherever they lie. A pair that is there twice is two pairs.
    """
    out = np.full(layout.shape, -1, np.int32)
    for micro, numbers in zip(layout, out, strict=True):
        for side in (0, 1):
            at = np.nonzero((micro >= 0) & (micro % 2 == side))
            by_pair = np.argsort(micro[at], kind="stable")
            numbers[at[0][by_pair], at[1][by_pair]] = np.arange(len(by_pair))
    return out


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
        reference: Reference | None = None,
    ):
        import grain  # here, since it imports jax

        if not 0 <= start <= plan.steps:
            raise ValueError(f"cannot start at step {start}: the plan has {plan.steps} steps")
        self.seconds_waited = 0.0
        self.next_step = start
        self._closed = False
        self._examples, self._plan, self._reference = examples, plan, reference
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
            plan, rows = self._plan, slice(None) if self._rows is None else self._rows
            layout = plan.layout(step)
            pair_ids = pair_numbers(layout)[:, rows] if plan.sides == 2 else None
            return make_rows(
                self._examples,
                layout[:, rows],
                plan.index.source_ids,
                plan.seq_len,
                pair_ids=pair_ids,
                reference=self._reference,
            )
        except Exception as error:
            error.add_note(f"while the batch of step {step} was built")
            return error
