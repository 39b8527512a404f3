"""The keys and values of what a layer has read, and the attention of one token more to them.

A cache holds keys in pieces [B, K, H, s] and values in pieces [B, K, s, H], so that both products
run along memory. Pieces grow with what lies before them: those beyond the longest sequence are not
looked at, and none is copied to be looked at. A layer that sees a window keeps that alone, as a
ring: position p lies in slot p mod S.
Shape suffixes: B rows, P positions, S slots, N query heads, K key/value heads, G query heads of a
key head, H head_dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from posttrain.models.head import soft_cap
from posttrain.sharding import constrain

CHUNK = 128
"""Slots of the first piece. A longer cache holds a multiple of it."""
AXES = ("batch", "kv_heads", None, None)
"""The logical dims of a piece."""
_NEGATIVE = -1e30  # a masked score: exp gives exactly 0

KEYS, VALUES = 3, 2
"""The dim of slots in a piece of keys, of values."""

Pieces = tuple[jax.Array, ...]


def cache_slots(length: int, window: int | None) -> int:
    """How many slots a layer needs for sequences of up to `length`, a multiple of CHUNK."""
    if window is None:
        return length
    multiple = CHUNK if window > CHUNK else 8
    return min(length, -(-window // multiple) * multiple)


def cut(slots: int) -> list[tuple[int, int]]:
    """(first slot, size) of the pieces of a cache: from 4 * CHUNK on two for every doubling."""
    found, start = [], 0
    while start < slots:
        half = 1 << max(start.bit_length() - 2, 0)
        size = min(max(CHUNK, half), slots - start)
        found.append((start, size))
        start += size
    return found


def to_cache(x_BPKH: jax.Array, lengths_B: jax.Array, window: int | None, dim: int) -> Pieces:
    """Keys or values of whole prompts as a cache holds them: the first P of its slots, or the whole
    ring.

    lengths_B: how many of the positions are real. dim: KEYS or VALUES.
    """
    positions = x_BPKH.shape[1]
    slots = cache_slots(positions, window)
    if slots < positions:
        last = lengths_B[:, None] - 1
        held = last - (last - jnp.arange(slots)) % slots  # the last position that falls on a slot
        x_BPKH = jnp.take_along_axis(x_BPKH, jnp.maximum(held, 0)[:, :, None, None], axis=1)
    x, before = constrain(jnp.moveaxis(x_BPKH, 1, dim), AXES), (slice(None),) * dim
    return tuple(x[*before, start : start + size] for start, size in cut(slots))


def write(pieces: Pieces, x_B1KH: jax.Array, at_B: jax.Array, dim: int) -> Pieces:
    """The cache of KEYS or VALUES (dim) with the token at each row's position at_B in it."""
    places = cut(sum(piece.shape[dim] for piece in pieces))
    slots = at_B % sum(size for _, size in places)
    where = (slice(None),) * (dim - 1)

    def one(row: jax.Array, x_1KH: jax.Array, slot: jax.Array) -> jax.Array:
        return row.at[*where, slot].set(x_1KH[0], mode="drop")

    return tuple(
        constrain(
            jax.vmap(one)(piece, x_B1KH, jnp.where(slots >= start, slots - start, size)), AXES
        )
        for piece, (start, size) in zip(pieces, places, strict=True)
    )


def cached_attention(
    q: jax.Array,
    keys: Pieces,
    values: Pieces,
    at: jax.Array,
    longest: jax.Array,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention of one new token a row over its cache; float32 softmax.

    q: [B, 1, N, H]; keys, values: that hold the token too; at: int32 [B], its position: it sees
    positions 0..at, of these the last `window`. longest: int32 scalar, more than any of `at` that
    matters. window, softcap, scale as in attention. Gives [B, 1, N, H].

    Piece by piece with a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867). A piece
    of which a row sees nothing changes not a bit of its result: that depends on no other row.
    """
    heads = keys[0].shape[1]
    q_BKGH = q.reshape(q.shape[0], heads, -1, q.shape[3])
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    places = cut(sum(piece.shape[KEYS] for piece in keys))
    slots = sum(size for _, size in places)

    def add(carry: Any, k: jax.Array, v: jax.Array, start: int) -> Any:
        most, total, out = carry
        behind = (at[:, None] - start - jnp.arange(k.shape[KEYS])) % slots
        visible = behind <= at[:, None]
        if window is not None:
            visible &= behind < window
        scores = jnp.einsum("bkgh,bkhs->bkgs", q_BKGH, k, preferred_element_type=jnp.float32)
        scores = soft_cap(scores * factor, softcap)
        scores = jnp.where(visible[:, None, None], scores, _NEGATIVE)
        top = jnp.maximum(most, scores.max(-1))
        p, kept = jnp.exp(scores - top[..., None]), jnp.exp(most - top)
        seen = jnp.einsum(
            "bkgs,bksh->bkgh", p.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return top, total * kept + p.sum(-1), out * kept[..., None] + seen

    rows = q_BKGH.shape[:3]
    carry = (jnp.full(rows, _NEGATIVE), jnp.zeros(rows), jnp.zeros(q_BKGH.shape, jnp.float32))
    for (start, _), k, v in zip(places, keys, values, strict=True):
        step = functools.partial(add, start=start)
        if start == 0:
            carry = step(carry, k, v)
        else:
            carry = jax.lax.cond(longest > start, step, lambda carry, *_: carry, carry, k, v)
    _, total, out = carry
    return (out / total[..., None]).astype(q.dtype).reshape(q.shape)
