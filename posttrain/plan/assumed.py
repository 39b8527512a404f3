"""Batches of data that nobody has: what is assumed of them, and their abstract arrays.

A plan is made before the data are prepared. Their shapes follow from the config all but for how
long examples are: unless --example-tokens says so, each fills a row, which is the most that memory
can need. All tokens are taken as trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from posttrain import sharding
from posttrain.data.pipeline import make_rows, pair_numbers
from posttrain.data.plan import BatchConfig, Plan
from posttrain.train.answers import Answers
from posttrain.train.rollout_rows import Layout, Shape, make_batch
from posttrain.types import EXAMPLES_OF, Batch, DataKind, Example


@dataclass(frozen=True)
class Examples:
    """So many examples of so many tokens, all trained but the first: what a Plan and a pipeline
    read."""

    number: int
    tokens: int
    sides: int

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]"""
        return np.full(self.number, self.tokens, np.int64)

    @property
    def trained(self) -> np.ndarray:
        """int64 [N]"""
        return self.lengths - 1

    @property
    def source_ids(self) -> np.ndarray:
        """int32 [N]"""
        return np.zeros(self.number, np.int32)

    @property
    def source_names(self) -> list[str]:
        """One."""
        return ["assumed"]

    def read(self, ids: Sequence[int], /) -> list[Example]:
        """Tokens that mean nothing."""
        one = Example(np.zeros(self.tokens, np.int32), np.ones(self.tokens, np.float32))
        return [one] * len(ids)


def plan_of_a_step(
    batch: BatchConfig, kind: DataKind, *, seq_len: int, tokens: int, shards: int
) -> Plan:
    """The plan of one full step. tokens: of an example; shards: as Plan's batch_shards.

    ConfigError where the config asks what the kind of data does not have.
    """
    sides = EXAMPLES_OF[kind]
    number = (batch.examples or 0) * sides
    if batch.rows is not None:
        number = batch.rows * max(1, seq_len // tokens) * sides
    examples = Examples(number, tokens, sides)
    return Plan(
        examples,
        batch.model_copy(update={"order": "sequential"}),
        seq_len=seq_len,
        seed=0,
        steps=1,
        batch_shards=shards,
        kind=kind,
    )


def batch_of(plan: Plan, mesh: jax.sharding.Mesh, *, reference: bool) -> Batch:
    """The abstract batch of a step, as the pipeline makes it. reference: with its log-probs."""
    layout = plan.layout(0)
    pairs = pair_numbers(layout)[:, :1] if plan.sides == 2 else None
    examples: Any = plan.index
    row = make_rows(examples, layout[:, :1], examples.source_ids, plan.seq_len, pair_ids=pairs)
    if reference:
        row = dataclasses.replace(row, reference_logps=row.loss_weights)
    return _on_mesh(row, mesh, plan.micro_rows)


def rollouts_of(shape: Shape, room: int, fields: Sequence[str], mesh: jax.sharding.Mesh) -> Batch:
    """The abstract batch of a step on sampled answers. room: its micro-batches; fields: of Answers
    beside what all have."""
    one = [np.zeros(shape.seq_len, np.float32)]
    answers = Answers([np.zeros(shape.seq_len, np.int32)], one, one, **dict.fromkeys(fields, one))
    ids = np.full((room, 1, shape.segments), -1, np.int32)
    ids[0, 0, 0] = 0
    return _on_mesh(make_batch(answers, Layout(ids, room), shape, [0]), mesh, shape.micro_rows)


def _on_mesh(row: Batch, mesh: jax.sharding.Mesh, rows: int) -> Batch:
    """One row's arrays -> those of all rows, abstract."""
    layout = sharding.batch_sharding(mesh)

    def wide(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((x.shape[0], rows, *x.shape[2:]), x.dtype, sharding=layout)

    return jax.tree.map(wide, row)
