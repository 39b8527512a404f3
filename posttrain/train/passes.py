"""What a set of parameters says of answers that are there: forward passes over whole rounds.

Shapes as in rollout_rows.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from posttrain import sharding
from posttrain.train.answers import Answers, Tokens
from posttrain.train.offline import local_rows, to_mesh
from posttrain.train.rollout_rows import Layout, Shape, lay_out, make_batch, take_out
from posttrain.train.step import Forward
from posttrain.types import Batch


def put(answers: Answers, layout: Layout, shape: Shape, mesh: jax.sharding.Mesh) -> Batch:
    """The batch of a layout as global arrays; each process builds its own rows."""
    rows = local_rows(mesh, shape.micro_rows)
    return to_mesh(make_batch(answers, layout, shape, rows), mesh, rows, shape.micro_rows)


class Passes:
    """Forward passes of one model. room: micro-batches of the largest round. One program serves all
    rounds and all parameters of that model."""

    def __init__(
        self,
        forward: Forward,
        shape: Shape,
        mesh: jax.sharding.Mesh,
        room: int,
        *,
        values: bool = False,
    ):
        self._forward, self._shape, self._mesh, self._room = forward, shape, mesh, room
        self._values = values

    @functools.cached_property
    def _program(self) -> Callable[..., jax.Array]:
        def said(params: Any, batch: Batch, number: Any) -> jax.Array:
            micro = jax.tree.map(lambda x: x[number], batch)
            outputs = self._forward.outputs(params, micro)
            return outputs.values if self._values else outputs.logps

        return jax.jit(said, out_shardings=sharding.replicated(self._mesh))

    def __call__(self, params: Any, answers: Answers) -> Tokens:
        """Of each answer, float32 [n]: log-probs of its sampled tokens (0 elsewhere), or a critic's
        values of all."""
        plain = Answers(answers.tokens, answers.weights, answers.sampled_logps)
        layout = lay_out(answers.lengths, answers.trained, self._shape, self._room)
        batch = replace(put(plain, layout, self._shape, self._mesh), sampled_logps=None)
        said = [self._program(params, batch, number) for number in range(layout.live)]
        rows = np.stack(jax.device_get(said))
        return take_out(rows, layout.ids[: layout.live], answers.lengths)
