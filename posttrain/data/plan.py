"""The plan of a run's data: which examples are in step k, and where in the batch they lie.

Everything follows from (lengths, trained counts, sources, config, seed): no step depends on the one
before it, and every host works out the same plan, so that resuming at step k takes the number k and
nothing else. `accumulate` and the number of batch shards move rows about inside a step; they never
change which examples the step has.

Order, mixture and the size of a step count units: samples, or preference pairs of two examples. A
step is packed into blocks of rows: samples into one, whose rows are then dealt to all micro-batches
and shards; pairs into one per micro-batch, so that the sides of a pair stay together.

Shapes: A micro-batches, B rows of a micro-batch, S segments of a row; N examples, U units; R rows;
E edges, one more than there are blocks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from pydantic import model_validator

from posttrain.config import Config, ConfigError, runtime, semantic
from posttrain.data.config import SourceConfig
from posttrain.data.order import ROWS, epoch_order, even_steps, mixture_repeats, permutation
from posttrain.data.pack import Rows, pack
from posttrain.types import DataKind


class BatchConfig(Config):
    """What one optimiser step takes, and how it is laid out."""

    rows: int | None = semantic(
        None, gt=0, help="rows of seq_len tokens per step, packed over the epoch (or: examples)"
    )
    examples: int | None = semantic(
        None, gt=0, help="examples (or pairs) per step, in as many rows as they need (or: rows)"
    )
    packing: Literal["best_fit", "none"] = semantic(
        "best_fit", help="best_fit: several examples share a row; none: one example per row"
    )
    order: Literal["shuffle", "sequential"] = semantic(
        "shuffle", help="shuffle anew in each epoch, or keep the order of the data"
    )
    accumulate: int = runtime(
        1, gt=0, help="micro-batches that a step is split into, to save memory"
    )
    threads: int = runtime(4, ge=0, help="threads that read ahead; 0 reads when asked")
    prefetch: int = runtime(8, gt=0, help="steps read ahead of the one that trains")

    @model_validator(mode="after")
    def _one_size(self) -> BatchConfig:
        if (self.rows is None) == (self.examples is None):
            raise ValueError("set exactly one of rows and examples: the size of a step")
        return self


_UNITS: dict[DataKind, str] = {
    "samples": "examples",
    "pairs": "pairs",
    "labelled": "answers",
    "twinned": "answers and twins",
}


@runtime_checkable
class Index(Protocol):
    """What a plan has to know of a cache."""

    @property
    def lengths(self) -> Int[np.ndarray, " N"]: ...

    @property
    def trained(self) -> Int[np.ndarray, " N"]: ...

    @property
    def source_ids(self) -> Int[np.ndarray, " N"]: ...

    @property
    def source_names(self) -> list[str]: ...

    @property
    def sides(self) -> int:
        """1: samples. 2: pairs; examples 2p and 2p + 1 are pair p's chosen and rejected side."""
        ...


@dataclass(frozen=True)
class _Epoch:
    """One epoch's rows (members are example ids) and the first row of each block, with the end."""

    rows: Rows
    edges: Int[np.ndarray, " E"]
    trained: Int[np.ndarray, " R"]


class Plan:
    """Steps 0 .. steps-1 over whole epochs. A batch never crosses epochs; the last one of an epoch
    may be short and is filled up with empty rows.

    sides (examples of a unit: 2 of a pair, else 1), steps, steps_per_epoch (of the first epoch),
    rows (of a step, empty ones included: accumulate * micro_rows), micro_rows (a multiple of
    batch_shards), max_segments (S), repeats (source name -> times an epoch sees each of its units),
    efficiency (share of all positions that hold a token) and fill (the same for rows that are in
    use: what packing is to be judged by).
    """

    def __init__(
        self,
        index: Index,
        batch: BatchConfig,
        *,
        seq_len: int,
        seed: int,
        epochs: int | None = None,
        steps: int | None = None,
        batch_shards: int = 1,
        sources: Mapping[str, SourceConfig] | None = None,
        kind: DataKind | None = None,
    ):
        """`epochs` whole epochs, or `steps` steps over as many as that takes: one of the two.

        `sources` gives weights and repeats by name, else every unit is seen once an epoch; `kind`:
        what units are called.
        Raises ConfigError for batch.rows of pairs; ValueError where an example is longer than
        seq_len, a side of a pair has no trained token, or a step would train on nothing.
        """
        if (epochs is None) == (steps is None):
            raise ValueError("give exactly one of epochs and steps: the length of the run")
        if (epochs if steps is None else steps) < 1:  # pyright: ignore[reportOptionalOperand]
            raise ValueError(f"epochs={epochs}, steps={steps}: must be at least 1")
        if not len(index.lengths):
            raise ValueError("the data set has no examples")
        self.index, self.batch, self.seq_len, self.seed = index, batch, seq_len, seed
        self.batch_shards, self.sides = batch_shards, index.sides
        self._units = _UNITS[kind or ("pairs" if self.sides == 2 else "samples")]
        self._blocks = batch.accumulate if self.sides == 2 else 1  # of a step
        self._groups = batch.accumulate * batch_shards // self._blocks  # that share a block's rows
        self._unit_sources = index.source_ids[:: self.sides]
        self._unit_lengths = index.lengths.reshape(-1, self.sides).sum(1)
        if self.sides == 2:
            self._refuse_half_pairs()
        self._repeats = self._mixture(sources)
        self.repeats = dict(zip(index.source_names, self._repeats.tolist(), strict=True))

        self._epochs: list[_Epoch] = []
        firsts = [0]
        while len(self._epochs) < epochs if epochs is not None else firsts[-1] < (steps or 0):
            self._epochs.append(self._plan_epoch(len(self._epochs)))
            firsts.append(firsts[-1] + (len(self._epochs[-1].edges) - 1) // self._blocks)
        self._firsts = np.asarray(firsts)  # the first step of each epoch, and the end
        self.steps = firsts[-1] if steps is None else steps
        self.steps_per_epoch = firsts[1]

        used = [self._epoch_part(e) for e in range(len(self._epochs))]
        self.max_segments = max(int(rows.sizes.max()) for rows, _ in used)
        widest = batch.rows or max(int(np.diff(edges).max()) for _, edges in used)
        self.micro_rows = -(-widest // self._groups) * batch_shards
        self.rows = batch.accumulate * self.micro_rows
        tokens = sum(int(rows.sums(index.lengths).sum()) for rows, _ in used)
        self.fill = tokens / (sum(len(rows) for rows, _ in used) * seq_len)
        self.efficiency = tokens / (self.steps * self.rows * seq_len)
        self._budget: int | None = None
        self._refuse_untrained()

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step, both from 0."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan of {self.steps} steps")
        epoch = int(np.searchsorted(self._firsts, step, side="right")) - 1
        return epoch, step - int(self._firsts[epoch])

    def epochs_after(self, step: int) -> float:
        """Epochs seen once `step` is done; epochs of a mixture need not have equally many steps."""
        epoch, k = self.epoch_of(step)
        return epoch + (k + 1) / int(self._firsts[epoch + 1] - self._firsts[epoch])

    def examples(self, step: int) -> Int[np.ndarray, " n"]:
        """The ids of a step's examples. Which they are, accumulation and mesh have no part in."""
        return np.concatenate([rows.members for rows, _ in self._step_blocks(step)])

    def layout(self, step: int) -> Int[np.ndarray, "A B S"]:
        """int32 example ids by micro-batch, row and segment; -1 where there is no segment.

        A shard's rows are a contiguous block of B / batch_shards. Rows are dealt to micro-batches
        and shards so that each has about as many trained tokens: the head's static budget is the
        largest count of all.
        """
        room = self.micro_rows // self.batch_shards
        groups = self.batch.accumulate * self.batch_shards
        out = np.full((groups, room, self.max_segments), -1, np.int32)
        place = np.zeros(groups, np.int64)
        for block, (rows, trained) in enumerate(self._step_blocks(step)):
            group_of = spread(trained, self._groups, room)
            for members, within in zip(rows, group_of, strict=True):
                group = block * self._groups + within
                out[group, place[group], : len(members)] = members
                place[group] += 1
        return out.reshape(self.batch.accumulate, self.micro_rows, self.max_segments)

    def head_budget(self) -> int:
        """The most trained tokens in one shard's rows of any micro-batch of any step."""
        if self._budget is None:
            room, most = self.micro_rows // self.batch_shards, 0
            for step in range(self.steps):
                for _, trained in self._step_blocks(step):
                    group_of = np.asarray(spread(trained, self._groups, room), np.int64)
                    loads = np.bincount(group_of, trained, self._groups)
                    most = max(most, int(loads.max()))
            self._budget = most
        return self._budget

    def describe(self) -> str:
        """A few lines for the terminal: size of the run, packing, mixture."""
        packed = sum(len(rows) for rows, _ in map(self._epoch_part, range(len(self._epochs))))
        taken = f"{self.batch.examples:,} {self._units} in " if self.batch.examples else ""
        lines = [
            f"{self.steps:,} steps ({self.steps_per_epoch:,} an epoch) of {taken}{self.rows:,} "
            f"rows x {self.seq_len:,} tokens in {self.batch.accumulate} micro-batch(es)",
            f"{packed:,} rows {self.fill:.2%} full, {self.efficiency:.2%} with the empty rows of "
            f"short steps; at most {self.max_segments} examples in a row",
        ]
        sizes = np.bincount(self._unit_sources, minlength=len(self.repeats))
        for (name, times), size in zip(self.repeats.items(), sizes.tolist(), strict=True):
            lines.append(f"{name}: {size:,} {self._units}, seen {times:.4g} times an epoch")
        return "\n".join(lines)

    def _mixture(self, sources: Mapping[str, SourceConfig] | None) -> np.ndarray:
        names = self.index.source_names
        if sources is None:
            return np.ones(len(names))
        return mixture_repeats(
            names,
            np.bincount(self._unit_sources, minlength=len(names)).tolist(),
            [sources[name].weight for name in names],
            [sources[name].repeats for name in names],
        )

    def _plan_epoch(self, epoch: int) -> _Epoch:
        cfg, index = self.batch, self.index
        units = epoch_order(
            self._unit_sources, self._repeats, seed=self.seed, epoch=epoch, order=cfg.order
        )
        if cfg.rows is not None:
            packed = pack(index.lengths[units], self.seq_len, packing=cfg.packing)
            if cfg.order == "shuffle":  # or a batch would have rows of like lengths
                turn = permutation(len(packed), ROWS, self.seed, epoch)
            else:
                turn = np.argsort(packed.members[packed.starts[:-1]], kind="stable")
            packed = packed.take(turn)
            rows = Rows(units[packed.members], packed.starts)
            edges = np.append(np.arange(0, len(rows), cfg.rows), len(rows))
        else:
            size = cfg.examples or 0
            if cfg.order == "shuffle":
                lengths = self._unit_lengths[units]
                units = units[even_steps(lengths, size, seed=self.seed, epoch=epoch)]
            steps = [units[i : i + size] for i in range(0, len(units), size)]
            blocks = [self._pack_block(ids) for step in steps for ids in self._split(step)]
            edges = np.cumsum([0] + [len(block) for block in blocks])
            rows = Rows(
                np.concatenate([block.members for block in blocks]),
                np.cumsum(np.concatenate([[0]] + [block.sizes for block in blocks])),
            )
        return _Epoch(rows, edges, rows.sums(index.trained))

    def _split(self, units: np.ndarray) -> list[np.ndarray]:
        """The example ids of each block of a step; pairs are dealt by their tokens."""
        if self.sides == 1:
            return [units]
        tokens = self._unit_lengths[units]
        block_of = np.asarray(spread(tokens, self._blocks, len(units)))
        pairs = [units[block_of == block] for block in range(self._blocks)]
        return [(2 * pair[:, None] + np.arange(2)).reshape(-1) for pair in pairs]

    def _pack_block(self, ids: np.ndarray) -> Rows:
        packed = pack(self.index.lengths[ids], self.seq_len, packing=self.batch.packing)
        return Rows(ids[packed.members], packed.starts)

    def _epoch_part(self, e: int) -> tuple[Rows, np.ndarray]:
        """The rows of epoch e that the run gets to, and their blocks' edges."""
        epoch = self._epochs[e]
        edges = epoch.edges[: (self.steps - int(self._firsts[e])) * self._blocks + 1]
        ends = epoch.rows.starts[: edges[-1] + 1]
        return Rows(epoch.rows.members[: ends[-1]], ends), edges

    def _step_blocks(self, step: int) -> Iterator[tuple[Rows, np.ndarray]]:
        """Each block's rows, and each row's trained tokens."""
        e, k = self.epoch_of(step)
        epoch = self._epochs[e]
        edges = epoch.edges[k * self._blocks : (k + 1) * self._blocks + 1].tolist()
        for first, last in pairwise(edges):
            starts = epoch.rows.starts[first : last + 1]
            rows = Rows(epoch.rows.members[starts[0] : starts[-1]], starts - starts[0])
            yield rows, epoch.trained[first:last]

    def _refuse_half_pairs(self) -> None:
        if self.batch.rows is not None:
            raise ConfigError(
                f"batch.rows is {self.batch.rows}: a step takes pairs, not rows, since both sides "
                "of a pair (or an answer and its twin) are in it; set batch.examples instead"
            )
        if len(bad := np.flatnonzero(self.index.trained == 0)):
            pair, side = divmod(int(bad[0]), 2)
            raise ValueError(
                f"pair {pair}: its {('chosen', 'rejected')[side]} side has no trained token, so "
                f"that there is nothing to prefer ({len(bad)} such sides); see what `posttrain "
                "data prepare` says was truncated"
            )

    def _refuse_untrained(self) -> None:
        """A step whose every token is masked has no loss: better said before step 1."""
        for e, epoch in enumerate(self._epochs):
            sums = np.add.reduceat(epoch.trained, epoch.edges[: -1 : self._blocks])
            for k in np.flatnonzero(sums == 0):
                step = int(self._firsts[e] + k)
                if step < self.steps:
                    ids = self.examples(step)
                    names = sorted({self.index.source_names[self.index.source_ids[i]] for i in ids})
                    raise ValueError(
                        f"step {step} trains on nothing: none of its {len(ids)} examples (the "
                        f"first is example {ids[0]}, sources: {', '.join(names)}) has a trained "
                        "token; see what `posttrain data prepare` says was truncated, or use "
                        "larger steps"
                    )


def spread(trained: np.ndarray, groups: int, room: int) -> list[int]:
    """The group of each row: most trained tokens first, each to the lightest group with room.

    Longest-processing-time scheduling (Graham 1969), here with a limit to the rows of a group.
    """
    if groups == 1:
        return [0] * len(trained)
    group_of = [0] * len(trained)
    heap = [(0, group, room) for group in range(groups)]
    weights = trained.tolist()
    for r in sorted(range(len(weights)), key=lambda r: -weights[r]):
        load, group, left = heap[0]
        group_of[r] = group
        if left > 1:
            heapq.heapreplace(heap, (load + weights[r], group, left - 1))
        else:
            heapq.heappop(heap)
    return group_of
