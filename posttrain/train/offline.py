"""Batches of planned data, on the mesh: each process builds its own devices' rows and no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from posttrain import sharding
from posttrain.data.pipeline import Pipeline, Reference
from posttrain.data.plan import Plan
from posttrain.train.source import Told
from posttrain.train.throughput import StepSize
from posttrain.types import Batch


def local_rows(mesh: jax.sharding.Mesh, rows: int) -> list[int]:
    """The rows of a micro-batch of `rows` that this process's devices hold, ascending."""
    layout = sharding.batch_sharding(mesh)
    held = layout.addressable_devices_indices_map((1, rows)).values()
    return sorted({row for index in held if index for row in range(rows)[index[1]]})


def to_mesh(batch: Batch, mesh: jax.sharding.Mesh, rows: list[int], total_rows: int) -> Batch:
    """numpy arrays [A, len(rows), ...] of this process -> global arrays [A, total_rows, ...]."""
    layout = sharding.batch_sharding(mesh)
    place = {row: i for i, row in enumerate(rows)}

    def put(local: np.ndarray) -> jax.Array:
        def block(index: Any) -> np.ndarray:
            wanted = range(total_rows)[index[1]]
            first = place[wanted[0]]
            return local[:, first : first + len(wanted)]

        shape = (local.shape[0], total_rows, *local.shape[2:])
        return jax.make_array_from_callback(shape, layout, block)

    return jax.tree.map(put, batch)


class OfflineSource:
    """The batches of a plan from step `start` on, each a function of its number alone.

    With a `reference` they hold what it said of their tokens.
    """

    def __init__(
        self,
        examples: Any,
        plan: Plan,
        mesh: jax.sharding.Mesh,
        start: int = 0,
        *,
        reference: Reference | None = None,
    ):
        self._mesh, self._plan, self._next = mesh, plan, start
        self._rows = local_rows(mesh, plan.micro_rows)
        self._read_from = lambda step: Pipeline(
            examples, plan, rows=self._rows, start=step, reference=reference
        )
        self._pipeline, self._waited = self._read_from(start), 0.0

    @property
    def waited(self) -> float:
        """Seconds that next() stood still because no batch was ready."""
        return self._waited + self._pipeline.seconds_waited

    def seek(self, step: int) -> None:
        """Goes on with the batch after `step` updates."""
        self._waited = self.waited
        self._pipeline.close()
        self._pipeline, self._next = self._read_from(step), step

    @property
    def ahead(self) -> int:
        """One step: a batch depends on none before it."""
        return 1

    def watch(self, stopped: Callable[[], bool]) -> None:
        """Nothing takes its time here."""

    def next(self, state: Any = None) -> Batch:
        """The next step's batch as global arrays; the state has no part in it. Raises whatever the
        loader met."""
        batch = next(self._pipeline)
        self._next += 1
        return to_mesh(batch, self._mesh, self._rows, self._plan.micro_rows)

    def told(self) -> Told:
        """Of the batch given last: what the plan says of it."""
        step = self._next - 1
        size, ids = step_size(self._plan, step), self._plan.examples(step)
        return Told(size, self._plan.epochs_after(step), examples=ids)  # pyright: ignore[reportArgumentType]

    def save(self, step: int) -> Mapping[str, Any]:
        """Nothing: the number of the step says it all."""
        return {}

    def close(self) -> None:
        """Ends the loader's threads."""
        self._pipeline.close()


def step_size(plan: Plan, step: int) -> StepSize:
    """What step `step` of the plan holds; of pairs, both sides count, and a pair is an example."""
    ids = plan.examples(step)
    return StepSize(
        examples=len(ids) // plan.sides,
        trained=int(plan.index.trained[ids].sum()),
        positions=plan.rows * plan.seq_len,
        segments=plan.index.lengths[ids].astype(np.int64),
    )
