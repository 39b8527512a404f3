"""Answers into rows: batches of one shape, whatever the lengths of what was sampled.

A step's answers are packed into rows of seq_len tokens, the rows dealt to micro-batches of a fixed
number of rows. There is room for one answer a row; micro-batches that stay empty come last, and the
step passes over them (Forward.ragged). One program serves all lengths.

Shapes: N answers, A micro-batches, B rows, T = seq_len positions, S segments of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from posttrain.data.pack import pack
from posttrain.data.pipeline import make_rows
from posttrain.data.plan import spread
from posttrain.train.answers import Answers
from posttrain.types import Batch, Example


@dataclass(frozen=True)
class Shape:
    """What every batch of a run has in common. shards: blocks that rows of a micro-batch are cut
    into, each of `rows` rows; segments: most answers of a row."""

    shards: int
    rows: int
    seq_len: int
    segments: int

    @property
    def micro_rows(self) -> int:
        """B"""
        return self.shards * self.rows

    def micro_batches(self, answers: int) -> int:
        """A that any so many answers fit into, each with a row of its own."""
        return -(-answers // self.micro_rows)


@dataclass(frozen=True)
class Layout:
    """Where answers lie. ids: index of an answer, -1 where there is no segment. live: micro-batches
    that hold any, the first ones."""

    ids: Int[np.ndarray, "A B S"]
    live: int


def lay_out(
    lengths: Int[np.ndarray, " N"], trained: Int[np.ndarray, " N"], shape: Shape, room: int
) -> Layout:
    """The layout of N answers in `room` micro-batches; a function of the arguments alone."""
    rows = _cut(list(pack(lengths, shape.seq_len)), shape.segments)
    live = -(-len(rows) // shape.micro_rows)
    assert live <= room, (live, room)
    groups = live * shape.shards
    loads = np.array([trained[row].sum() for row in rows])
    ids = np.full((room * shape.shards, shape.rows, shape.segments), -1, np.int32)
    place = np.zeros(groups, np.int64)
    for row, group in zip(rows, spread(loads, groups, shape.rows), strict=True):
        ids[group, place[group], : len(row)] = row
        place[group] += 1
    return Layout(ids.reshape(room, shape.micro_rows, shape.segments), live)


def _cut(rows: Sequence[np.ndarray], segments: int) -> list[np.ndarray]:
    """Rows of at most so many segments."""
    return [row[i : i + segments] for row in rows for i in range(0, len(row), segments)]


class _Read:
    """The answers as a pipeline's examples."""

    def __init__(self, answers: Answers):
        self._answers = answers

    def read(self, ids: Sequence[int], /) -> list[Example]:
        found = self._answers
        return [Example(found.tokens[i], found.weights[i]) for i in ids]


def make_batch(answers: Answers, layout: Layout, shape: Shape, rows: Sequence[int]) -> Batch:
    """numpy arrays [A, len(rows), ...] of those rows of each micro-batch."""
    ids = layout.ids[:, list(rows)]
    plain = make_rows(_Read(answers), ids, np.zeros(len(answers), np.int32), shape.seq_len)
    fields: dict[str, Any] = {
        name: place(values, ids, shape.seq_len)
        for name, values in answers.known()
        if name not in ("tokens", "weights")
    }
    return Batch(
        tokens=plain.tokens,
        positions=plain.positions,
        segment_ids=plain.segment_ids,
        loss_weights=plain.loss_weights,
        example_ids=plain.example_ids,
        source_ids=plain.source_ids,
        **fields,
    )


def place(
    values: Sequence[np.ndarray], ids: Int[np.ndarray, "*rows S"], seq_len: int
) -> np.ndarray:
    """float32 [*rows, T]: each answer's values where its tokens lie, 0 elsewhere."""
    out = np.zeros((ids[..., 0].size, seq_len), np.float32)
    for row, members in zip(out, ids.reshape(-1, ids.shape[-1]), strict=True):
        start = 0
        for i in members[members >= 0].tolist():
            end = start + len(values[i])
            row[start:end] = values[i]
            start = end
    return out.reshape(*ids.shape[:-1], seq_len)


def take_out(
    rows: np.ndarray, ids: Int[np.ndarray, "*rows S"], lengths: Int[np.ndarray, " N"]
) -> list[np.ndarray]:
    """What `place` put in: of each answer, float32 [n]."""
    found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(lengths)
    flat = rows.reshape(-1, rows.shape[-1])
    for row, members in zip(flat, ids.reshape(-1, ids.shape[-1]), strict=True):
        start = 0
        for i in members[members >= 0].tolist():
            end = start + int(lengths[i])
            found[i] = np.array(row[start:end], np.float32)
            start = end
    return found
