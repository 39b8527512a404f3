"""The embedding on a mesh: plain indexing's values and gradient, and what crosses the wire."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain.models.embedding import look_up
from posttrain.sharding import BATCH_AXES
from tests.models.hlo import collectives
from tests.models.tiny import mesh_of

B, T, V, D = 16, 13, 40, 8  # no other dim is 13: T names activations in the HLO


@pytest.mark.parametrize(
    ("shape", "rows", "vocab", "positions"),
    [
        ((2, 4, 1), B, V, T),
        ((2, 2, 2), B, V, T),
        ((1, 4, 2, 1, 1, 2), B, V, T),  # fsdp over two axes
        ((1, 1, 8), B, V, T),
        ((1, 2, 1, 2, 2), B, V, 14),
        ((1, 1, 8), B, V - 3, T),  # the mesh does not divide the vocabulary
        ((2, 4, 1), 3, V, T),  # nor the rows
        ((1, 2, 2, 1, 2), B, V, T),  # nor the positions
    ],
)
def test_equals_plain_indexing(
    shape: tuple[int, ...], rows: int, vocab: int, positions: int
) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(vocab, D)).astype(np.float32)
    tokens = rng.integers(0, vocab, (rows, positions)).astype(np.int32)
    scale = rng.normal(size=(*tokens.shape, D)).astype(np.float32)
    want = np.zeros((vocab, D))
    np.add.at(want, tokens, scale.astype(np.float64))

    def total(table: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = look_up(table, tokens, jnp.float32)
        return (found * scale).sum(), found

    with jax.set_mesh(mesh_of(*shape)):
        (_, found), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(table)
    np.testing.assert_array_equal(found, table[tokens])
    np.testing.assert_allclose(grad, want, atol=1e-5)


def test_the_table_travels_and_never_the_batch() -> None:
    """One gather of the table, one scattered sum of its gradient; plain indexing does otherwise."""
    mesh = mesh_of(2, 4, 1)

    def make(dims: tuple[int, ...], dtype: Any, spec: P) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    table = make((V, D), jnp.float32, P(None, "fsdp"))
    tokens = make((B, T), jnp.int32, P(BATCH_AXES))

    def found(function: Any) -> list[tuple[str, list[int]]]:
        def total(table: jax.Array, tokens: jax.Array) -> jax.Array:
            return jnp.sin(function(table, tokens)).sum()

        grads = jax.jit(jax.value_and_grad(total), out_shardings=(None, table.sharding))
        with jax.set_mesh(mesh):
            lines = collectives(grads.lower(table, tokens).compile().as_text())
        shapes = [re.search(r"= \(?\w+\[([\d,]*)\]", c.line) for c in lines]
        return [
            (c.op, [int(x) for x in s.group(1).split(",") if x])
            for c, s in zip(lines, shapes, strict=True)
            if s
        ]

    ours = found(lambda table, tokens: look_up(table, tokens, jnp.float32))
    assert sorted(op for op, shape in ours if shape) == [
        "all-gather",
        "all-reduce",
        "reduce-scatter",
    ]
    assert not any(T in shape for _, shape in ours)
    plain = found(lambda table, tokens: table[tokens])
    assert any(T in shape for _, shape in plain)
