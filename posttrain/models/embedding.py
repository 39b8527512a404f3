"""The token embedding: rows of a table that is cut along both of its dims.

Left to the compiler, the gradient's scatter gathers the whole batch's activations onto every
device. Inside shard_map each device gathers the table once, looks up its own rows, and adds up a
gradient of the table, in float32, that is scattered once.
Shape suffixes: B rows, T positions, D embed, V vocabulary rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from posttrain.sharding import (
    BATCH_AXES,
    all_gather,
    axes_of,
    batch_shards,
    partition_spec,
    reduce_scatter,
)


@dataclass(frozen=True)
class _Plan:
    """Where the table is cut. No mesh: one device, or rows that the mesh does not divide."""

    mesh: Any
    dtype: Any  # of the result
    context: str | None  # the axis that rows are cut along, if any
    fsdp: tuple[str, ...]  # those that D is cut along
    tensor: str | None  # that of V

    @property
    def rows(self) -> P:
        """The layout of [B, T, ...]."""
        return P(BATCH_AXES, self.context)


def look_up(
    table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any, *, gathered: bool = False
) -> jax.Array:
    """table[tokens] in `dtype`, [B, T, D]. Its gradient adds up in float32, whatever dtype is.

    gathered: the table is not cut along D: there is nothing to gather.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or tokens_BT.shape[0] % batch_shards(mesh):
        plan = _Plan(None, jnp.dtype(dtype), None, (), None)
    else:
        tensor, fsdp = partition_spec(("vocab", "embed"), table_VD.shape, mesh)
        (context,) = partition_spec(("length",), tokens_BT.shape[1:], mesh)
        fsdp = () if gathered else axes_of(fsdp)
        plan = _Plan(mesh, jnp.dtype(dtype), context, fsdp, tensor)
    with jax.named_scope("embedding"):
        found: Any = _look_up(table_VD, tokens_BT, plan)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table_VD: jax.Array, tokens_BT: jax.Array, plan: _Plan) -> Any:
    table, rows = P(plan.tensor, plan.fsdp or None), plan.rows
    return _mapped(_take, plan, (table, rows), rows)(table_VD, tokens_BT)


def _forward(table_VD: jax.Array, tokens_BT: jax.Array, plan: _Plan) -> Any:
    return _look_up(table_VD, tokens_BT, plan), (table_VD, tokens_BT)


def _backward(plan: _Plan, saved: Any, ct_BTD: jax.Array) -> Any:
    table_VD, tokens_BT = saved
    rows, table = plan.rows, P(plan.tensor, plan.fsdp or None)
    add = functools.partial(_add, rows=table_VD.shape[0])
    return _mapped(add, plan, (rows, rows), table)(ct_BTD, tokens_BT).astype(table_VD.dtype), None


_look_up.defvjp(_forward, _backward)


def _mapped(function: Callable, plan: _Plan, in_specs: Any, out_specs: Any) -> Callable:
    function = functools.partial(function, plan=plan)
    if plan.mesh is None:
        return function
    return jax.shard_map(
        function, mesh=plan.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _own(tokens_BT: jax.Array, rows: int, plan: _Plan) -> jax.Array:
    """Indices into this device's `rows` rows of the table; `rows` for tokens of others."""
    if plan.tensor is None:
        return tokens_BT
    ids = tokens_BT - jax.lax.axis_index(plan.tensor) * rows
    return jnp.where((ids >= 0) & (ids < rows), ids, rows)


def _take(table: jax.Array, tokens_BT: jax.Array, plan: _Plan) -> jax.Array:
    table = all_gather(table.astype(plan.dtype), plan.fsdp, 1)
    ids = _own(tokens_BT, table.shape[0], plan)
    found = table.at[ids].get(mode="fill", fill_value=0)
    return jax.lax.psum(found, plan.tensor) if plan.tensor else found


def _add(ct_BTD: jax.Array, tokens_BT: jax.Array, rows: int, plan: _Plan) -> jax.Array:
    """This device's part of the table's gradient, float32."""
    if plan.tensor:
        rows //= plan.mesh.shape[plan.tensor]
    zeros = jnp.zeros((rows, ct_BTD.shape[-1]), jnp.float32)
    ids = _own(tokens_BT, rows, plan)
    grad = zeros.at[ids].add(ct_BTD.astype(jnp.float32), mode="drop")
    grad = reduce_scatter(grad, plan.fsdp, 1)
    if plan.mesh is None:
        return grad
    others = (*BATCH_AXES, *([plan.context] if plan.context else []))
    copies = [a for a in others if a not in plan.fsdp and plan.mesh.shape[a] > 1]
    return jax.lax.psum(grad, tuple(copies)) if copies else grad
