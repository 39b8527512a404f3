"""Arrays on a mesh, filled and read block by block: a whole tensor is never on the host.

A block is, for each device, the next few rows of its own shard along one dim, so that filling and
reading move nothing between devices. Leading dims (layers, experts) are taken one index at a time,
of each shard its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

BLOCK_BYTES = 8 * 2**20
"""What a block holds, over all devices, at the most (one row of each at the least)."""

Index = tuple[int, ...]
Read = Callable[[Index, tuple[slice, ...]], np.ndarray]
"""(index into the leading dims, slices of the others) -> those values."""


@dataclass(frozen=True)
class _Cut:
    """`lead` leading dims are taken one index at a time, `size` rows of a shard along `dim`."""

    shape: tuple[int, ...]
    sharding: NamedSharding
    lead: int
    dim: int
    size: int

    @functools.cached_property
    def local(self) -> tuple[int, ...]:
        """The shape of a device's shard."""
        return self.sharding.shard_shape(self.shape)

    @property
    def block(self) -> tuple[int, ...]:
        """The shape of a block, over all devices."""
        one = (1,) * self.lead + self.local[self.lead :]
        one = (*one[: self.dim], self.size, *one[self.dim + 1 :])
        pairs = zip(one, self.shape, self.local, strict=True)
        return tuple(n * (whole // own) for n, whole, own in pairs)

    def starts(self) -> Iterator[Index]:
        """Where in each shard its blocks begin; the last overlaps the one before it."""
        rows = self.local[self.dim]
        for lead in np.ndindex(self.local[: self.lead]):
            for start in range(0, rows, self.size):
                at = [*map(int, lead), *([0] * (len(self.shape) - self.lead))]
                at[self.dim] = min(start, rows - self.size)
                yield tuple(at)

    def where(self, at: Index, block_index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The slices of the array that block[block_index] stands for; of one shard's part."""
        found = []
        sizes = zip(block_index, self.block, self.shape, self.local, at, strict=True)
        for part, n, whole, own, start in sizes:
            begin, end, _ = part.indices(n)
            shard = begin // (n * own // whole)
            found.append(slice(shard * own + start, shard * own + start + end - begin))
        return tuple(found)


def _cut(shape: Sequence[int], dtype: Any, sharding: Any, lead: int, dim: int) -> _Cut:
    assert isinstance(sharding, NamedSharding)
    local = sharding.shard_shape(tuple(shape))
    shards = math.prod(shape) // math.prod(local)
    row = math.prod(local[lead:]) // local[lead + dim] * shards * jnp.dtype(dtype).itemsize
    size = min(max(1, BLOCK_BYTES // max(row, 1)), local[lead + dim])
    blocks = -(-local[lead + dim] // size)
    size = -(-local[lead + dim] // blocks)  # even blocks
    return _Cut(tuple(shape), sharding, lead, lead + dim, size)


@functools.cache
def _putter(sharding: NamedSharding) -> Any:
    def put(array: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(array, block, tuple(at))

    spec = sharding.spec
    mapped = jax.shard_map(
        put, mesh=sharding.mesh, in_specs=(spec, spec, P()), out_specs=spec, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=0)


@functools.cache
def _taker(cut: _Cut, dtype: Any, gathered: bool) -> Any:
    spec, shards = cut.sharding.spec, cut.block
    sizes = [n * own // whole for n, own, whole in zip(shards, cut.local, cut.shape, strict=True)]

    def take(array: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(array, tuple(at), sizes).astype(dtype)

    mapped = jax.shard_map(
        take, mesh=cut.sharding.mesh, in_specs=(spec, P()), out_specs=spec, check_vma=False
    )
    whole = NamedSharding(cut.sharding.mesh, P() if gathered else spec)
    return jax.jit(mapped, out_shardings=whole)


def fill(like: jax.ShapeDtypeStruct, lead: int, dim: int, read: Read) -> jax.Array:
    """A new array of `like`'s shape, dtype and sharding, with the values that `read` gives.

    dim: of the dims after the `lead` leading ones, that whose rows are read together. A process
    reads only what its devices hold; what several of them hold, once.
    """
    cut = _cut(like.shape, like.dtype, like.sharding, lead, dim)
    array = jnp.zeros(like.shape, like.dtype, device=cut.sharding)
    for at in cut.starts():
        seen: dict[Any, np.ndarray] = {}

        def own(index: Any, at: Index = at, seen: dict[Any, np.ndarray] = seen) -> np.ndarray:
            where = cut.where(at, index)
            spans = tuple((s.start, s.stop) for s in where)
            if spans not in seen:
                values = read(tuple(s.start for s in where[:lead]), where[lead:])
                seen[spans] = values.reshape([stop - start for start, stop in spans])
            return seen[spans]

        block = jax.make_array_from_callback(cut.block, cut.sharding, own)
        array = _putter(cut.sharding)(array, block, np.array(at, np.int32))
        jax.block_until_ready(array)  # the host holds one block, not a queue of them
    return array


def blocks(
    array: jax.Array, lead: int, dim: int, dtype: Any
) -> Iterator[tuple[Index, int, np.ndarray]]:
    """(index into the leading dims, first row of `dim`, those rows) until all were given.

    Of an array that lies on several processes each must take them all, and each gets them all.
    """
    cut = _cut(array.shape, array.dtype, array.sharding, lead, dim)
    take = _taker(cut, jnp.dtype(dtype), not array.is_fully_addressable)
    given = 0
    for at in cut.starts():
        found = take(array, np.array(at, np.int32))
        whole = np.asarray(found.addressable_data(0) if found.is_fully_replicated else found)
        # the block's parts: of each shard of the leading dims and of `dim`, its own
        split = [range(s // o) for s, o in zip(cut.shape, cut.local, strict=True)]
        skip = max(given - at[cut.dim], 0) if at[cut.dim] else 0
        for shards in np.ndindex(*(len(split[i]) for i in (*range(lead), cut.dim))):
            index = tuple(at[i] + shard * cut.local[i] for i, shard in enumerate(shards[:lead]))
            rows = slice(shards[-1] * cut.size + skip, (shards[-1] + 1) * cut.size)
            place: list[Any] = [*shards[:lead], *([slice(None)] * (array.ndim - lead))]
            place[cut.dim] = rows
            first = shards[-1] * cut.local[cut.dim] + at[cut.dim] + skip
            yield index, first, whole[tuple(place)]
        given = at[cut.dim] + cut.size


def whole(array: jax.Array) -> np.ndarray:
    """The array on every host, for small ones. Every process must call it."""
    if not array.is_fully_addressable:
        assert isinstance(array.sharding, NamedSharding)
        replicated = NamedSharding(array.sharding.mesh, P())
        array = jax.jit(lambda x: x, out_shardings=replicated)(array)
    return np.asarray(array.addressable_data(0) if array.is_fully_replicated else array)
