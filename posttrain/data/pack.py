"""The layout of a batch: which examples share a row of `capacity` tokens.

Packing never decides what is trained on, or when: order.py has decided that. It takes a window of
that order and puts its examples into as few rows as it can. Best-fit decreasing leaves 1.5 to 2% of
gsm8k's positions empty at 1,024, because it takes one example at a time; here a row starts with the
longest example left and all its fillers are chosen at once, by subset sum over the lengths that are
left (Martello & Toth, "Knapsack Problems", 1990, section 4.2, with Python integers as bit sets).

Shapes: N examples, R rows, E = R + 1 edges between them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import neg

import numpy as np
from jaxtyping import Int

WINDOW = 65536
"""Examples that are packed together: enough for full rows, few enough to keep the order random."""

GOOD = 0.999
"""Best-fit decreasing that fills this share of the positions is good enough: search no further."""

FINEST = 4096
"""The search sees a row as at most so many units: its time does not grow with longer rows."""


@dataclass(frozen=True)
class Rows(Sequence):
    """Rows of examples, flat: row r holds members[starts[r] : starts[r + 1]]."""

    members: Int[np.ndarray, " N"]
    starts: Int[np.ndarray, " E"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, r):
        """The members of row r (an index array), or with a slice a list of them."""
        if isinstance(r, slice):
            return [self[i] for i in range(*r.indices(len(self)))]
        if not -len(self) <= r < len(self):
            raise IndexError(f"row {r} of {len(self)}")
        r %= len(self)
        return self.members[self.starts[r] : self.starts[r + 1]]

    @property
    def sizes(self) -> Int[np.ndarray, " R"]:
        """Examples per row."""
        return np.diff(self.starts)

    def take(self, rows: Int[np.ndarray, " K"]) -> Rows:
        """The named rows, in that order."""
        sizes = self.sizes[rows]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
        return Rows(self.members[np.repeat(self.starts[rows], sizes) + within], starts)

    def sums(self, values: Int[np.ndarray, " M"]) -> Int[np.ndarray, " R"]:
        """Per row, the sum of values[member] (a row is never empty)."""
        if not len(self):
            return np.zeros(0, np.int64)
        return np.add.reduceat(values[self.members].astype(np.int64), self.starts[:-1])


def pack(
    lengths: Int[np.ndarray, " N"],
    capacity: int,
    *,
    window: int = WINDOW,
    packing: str = "best_fit",
) -> Rows:
    """Rows of at most `capacity` tokens that hold every example 0..N-1 once.

    The examples of a row stand in the given order. With `packing="none"` each has a row of its own.
    Windows are of equal size, at most `window`: a short last one would pack worse than the others.
    The result depends on the arguments alone. Raises ValueError for a length outside 1..capacity.
    """
    lengths = np.asarray(lengths)
    bad = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(bad):
        raise ValueError(
            f"example {bad[0]} has {lengths[bad[0]]} tokens, a row holds 1 to {capacity} "
            f"({len(bad)} such examples): raise seq_len or set data.too_long"
        )
    n = len(lengths)
    if packing == "none" or n == 0:
        return Rows(np.arange(n), np.arange(n + 1))
    count = -(-n // window)
    edges = [n * i // count for i in range(count + 1)]
    row_of, rows = np.empty(n, np.int64), 0
    for start, end in pairwise(edges):
        row_of[start:end] = rows + _pack_window(lengths[start:end], capacity)
        rows = int(row_of[start:end].max()) + 1
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
    return Rows(np.argsort(row_of, kind="stable"), starts)


def _pack_window(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each example: best-fit decreasing, or subset sum where that needs fewer rows."""
    row_of = _best_fit_decreasing(lengths, capacity)
    rows = row_of.max() + 1
    if lengths.sum() >= GOOD * rows * capacity or rows == -(-lengths.sum() // capacity):
        return row_of
    unit = -(-capacity // FINEST)
    coarse = -(-lengths // unit)  # rounded up: what fits in units fits in tokens
    patterns = list(_patterns(np.bincount(coarse), capacity // unit))
    if sum(times for _, times in patterns) >= rows:
        return row_of
    slots = np.concatenate([np.tile(pattern, times) for pattern, times in patterns])
    sizes = np.repeat([len(p) for p, _ in patterns], [times for _, times in patterns])
    # The k-th slot for a length takes the k-th example of that length.
    row_of[np.argsort(coarse, kind="stable")] = np.repeat(np.arange(len(sizes)), sizes)[
        np.argsort(slots, kind="stable")
    ]
    return row_of


def _best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each example: longest first, each into the fullest row that has room for it."""
    row_of = np.empty(len(lengths), np.int64)
    with_room: dict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit r: some row has room for r
    rows = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        fits = rooms >> n
        if fits:
            room = n + (fits & -fits).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, rows
            rows += 1
        row_of[i] = row
        with_room[room - n].append(row)
        rooms |= 1 << (room - n)
    return row_of


def _patterns(counts: np.ndarray, capacity: int) -> Iterator[tuple[list[int], int]]:
    """(lengths of a row, how many rows are like it), until every example is placed.

    A row starts with the longest length left, since that has the fewest ways to be placed, and a
    good pattern is used as often as the counts allow: one search serves many rows.
    """
    left = counts.tolist()
    lengths = [n for n in range(len(left) - 1, 0, -1) if left[n]]  # longest first
    while lengths:
        first = lengths[0]
        left[first] -= 1
        pattern = [first, *_fill(lengths, left, capacity - first)]
        left[first] += 1
        uses = {n: pattern.count(n) for n in pattern}
        times = min(left[n] // k for n, k in uses.items())
        for n, k in uses.items():
            left[n] -= k * times
            if not left[n]:
                lengths.remove(n)
        yield pattern, times


def _fill(lengths: list[int], left: list[int], room: int) -> list[int]:
    """The lengths (longest first) with the largest sum up to `room`; left[n] is the supply of n.

    Bit s of `sums` says that the sum s can be made. Long ones are tried first and the search ends
    at the first exact fill: so short ones, which fit anywhere, are kept for the hard rows.
    """
    mask, goal = (1 << (room + 1)) - 1, 1 << room
    sums, trail = 1, []
    for n in lengths[bisect_left(lengths, -room, key=neg) :]:
        if sums & goal:
            break
        supply = min(left[n], room // n)
        trail.append((n, sums))
        step = 1
        while supply:  # 1, 2, 4 ... at a time: every number up to the supply is a sum of these
            step = min(step, supply)
            sums |= (sums << (n * step)) & mask
            supply -= step
            step *= 2
    target, chosen = sums.bit_length() - 1, []
    for n, before in reversed(trail):
        while not before >> target & 1:
            chosen.append(n)
            target -= n
    return chosen[::-1]
