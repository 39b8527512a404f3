"""Dropout of what adapters read, drawn so that the layout of a batch changes nothing.

Each number has randomness of its own, by the run's seed, the update, the matrix, the example, the
place in it and the dim: packed or not, cut into micro-batches or over devices, it is lost or not.
A hash of these does; jax's generator takes several times as long to run and to compile.

Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def hashed(*words: Any) -> jax.Array:
    """uint32: a hash of integers, each taken modulo 2**32; of arrays, element by element.

    For each word MurmurHash3's finaliser, a bijection in which every bit moves all others.
    """
    x = jnp.uint32(0)
    for word in words:
        own = np.uint32(word % 2**32) if isinstance(word, int) else word.astype(jnp.uint32)
        x = (x ^ own) + np.uint32(0x9E3779B9)  # the golden ratio: 0 does not stay 0
        x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
        x = x ^ (x >> 16)
    return x


@dataclass(frozen=True)
class Dropout:
    """The randomness of one pass. key: of the update; examples_BT, positions_BT: whose tokens."""

    key: jax.Array  # uint32 scalar
    examples_BT: jax.Array  # int32
    positions_BT: jax.Array  # int32

    def keep(self, layer: Any, name: str, p: float, shape: tuple[int, ...]) -> jax.Array:
        """bool [B, T, ...]: which of the values that a matrix of a layer reads stay."""
        own = hashed(self.key, layer, zlib.crc32(name.encode()))
        token_BT = hashed(own, self.examples_BT, self.positions_BT)
        dims = jnp.arange(math.prod(shape[2:])).reshape(shape[2:])
        bits = hashed(jnp.expand_dims(token_BT, tuple(range(2, len(shape)))), dims)
        return bits >= np.uint32(p * 2**32)


def set_dropout(layer: nnx.Module, dropout: Dropout, number: Any) -> None:
    """Gives the modules of layer `number` that have adapters their randomness, for one pass."""
    modules: list[Any] = [module for _, module in nnx.iter_modules(layer)]
    for module in modules:
        if hasattr(module, "adapter"):
            module.dropout, module.number = dropout, number


def dropped(module: Any, name: str, x: jax.Array) -> jax.Array:
    """What the adapter of module.<name> reads: x with some values 0, in training with dropout."""
    dropout, p = getattr(module, "dropout", None), module.adapter.dropout
    if dropout is None or not p:
        return x
    keep = dropout.keep(module.number, name, p, x.shape)
    return jnp.where(keep, x / (1 - p), 0).astype(x.dtype)
