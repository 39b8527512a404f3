"""The product of rows that belong to groups with their group's matrix: what experts are made of.

`jax.lax.ragged_dot` is a kernel on TPU and GPU. Elsewhere jax writes it out as a product with every
group's matrix, the number of groups times the arithmetic and memory; on CPUs tiles of rows take its
place, one group at a time (the order of work of Megablocks' and Megablox' kernels).

Shape suffixes: M rows, K and N the matrices' dims, G groups.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

_TILE = 256  # rows of a tile, at the most: a group's matrix is read once per tile


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x_MK: jax.Array, w_GKN: jax.Array, sizes_G: jax.Array, implementation: str = "auto"
) -> Any:
    """[M, N] in x's dtype: each row times its group's matrix, added up in float32.

    Rows lie group by group, sizes_G (int32) of each; rows after the last group give 0.
    implementation: ragged (jax.lax.ragged_dot), tiles, auto (tiles on CPUs, else ragged).
    Differentiable in x and w. Inside shard_map all three vary over the same axes.
    """
    return _choose(_ragged, _tiles, implementation)(x_MK, w_GKN, sizes_G)


def _forward(x: jax.Array, w: jax.Array, sizes: jax.Array, implementation: str) -> Any:
    return grouped_matmul(x, w, sizes, implementation), (x, w, sizes)


def _backward(implementation: str, saved: Any, ct: jax.Array) -> Any:
    x, w, sizes = saved
    dx, dw = _choose(_ragged_vjp, _tiles_vjp, implementation)(x, w, sizes, ct)
    return dx, dw, None


grouped_matmul.defvjp(_forward, _backward)


def _choose(ragged: Any, tiles: Any, implementation: str) -> Any:
    if implementation == "auto":  # by the platform that is compiled for, not the one at hand
        return lambda *args: jax.lax.platform_dependent(*args, cpu=tiles, default=ragged)
    return {"ragged": ragged, "tiles": tiles}[implementation]


def _ragged(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    # what kernels leave in rows after the last group is not said: 0 here, and in the gradient
    own = jnp.arange(x.shape[0])[:, None] < sizes.sum()
    out = jax.lax.ragged_dot(jnp.where(own, x, 0), w, sizes, preferred_element_type=jnp.float32)
    return jnp.where(own, out, 0).astype(x.dtype)


def _ragged_vjp(x: jax.Array, w: jax.Array, sizes: jax.Array, ct: jax.Array) -> Any:
    return jax.vjp(lambda x, w: _ragged(x, w, sizes), x, w)[1](ct)


def _visits(sizes_G: jax.Array, rows: int, tile: int) -> Any:
    """(number of visits, visit -> (group, tile, bool [tile, 1]: its rows of the group)).

    Every group visits the tiles that hold rows of it, in order: at most tiles + groups - 1 visits.
    """
    ends = jnp.cumsum(sizes_G)
    first = (ends - sizes_G) // tile
    last = jnp.where(sizes_G > 0, (ends - 1) // tile + 1, first)
    done = jnp.cumsum(last - first)  # visits up to the end of each group

    def visit(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        group = jnp.searchsorted(done, i, side="right", method="compare_all")
        at = last[group] - (done[group] - i)
        row = at * tile + jnp.arange(tile)
        own = (row >= ends[group] - sizes_G[group]) & (row < ends[group])
        return group, at, own[:, None]

    return done[-1], visit


def _tile(rows: int, groups: int) -> int:
    """Rows of a tile: few, where groups are small, since each group fills its last one partly."""
    even = -(-rows // groups)
    return min(_TILE, max(8, 1 << (even // 2).bit_length()))


def _cut(x: jax.Array, tile: int) -> jax.Array:
    """[M, K] -> [tiles, tile, K], the last tile filled up with zeros."""
    x = jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))
    return x.reshape(-1, tile, x.shape[1])


def _tiles(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    tile = _tile(x.shape[0], w.shape[0])
    tiles = _cut(x, tile)
    number, visit = _visits(sizes, x.shape[0], tile)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        group, at, own = visit(i)
        y = jnp.dot(tiles[at], w[group], preferred_element_type=jnp.float32)
        return out.at[at].set(jnp.where(own, y.astype(out.dtype), out[at]))

    zeros = jnp.zeros_like(tiles, shape=(*tiles.shape[:2], w.shape[2]))
    out = jax.lax.fori_loop(0, number, body, zeros)
    return out.reshape(-1, w.shape[2])[: x.shape[0]]


def _tiles_vjp(x: jax.Array, w: jax.Array, sizes: jax.Array, ct: jax.Array) -> Any:
    tile = _tile(x.shape[0], w.shape[0])
    tiles, cts = _cut(x, tile), _cut(ct, tile)
    number, visit = _visits(sizes, x.shape[0], tile)

    def body(i: jax.Array, carry: Any) -> Any:
        dx, dw = carry
        group, at, own = visit(i)
        y = jnp.dot(cts[at], w[group].T, preferred_element_type=jnp.float32)
        dx = dx.at[at].set(jnp.where(own, y.astype(dx.dtype), dx[at]))
        mine = jnp.where(own, tiles[at], 0)
        dw = dw.at[group].add(jnp.dot(mine.T, cts[at], preferred_element_type=jnp.float32))
        return dx, dw

    zeros = (jnp.zeros_like(tiles), jnp.zeros_like(w, jnp.float32))
    dx, dw = jax.lax.fori_loop(0, number, body, zeros)
    return dx.reshape(-1, x.shape[1])[: x.shape[0]], dw.astype(w.dtype)
