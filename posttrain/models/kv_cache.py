"""The keys and values of what a layer has read, and the attention of one token more to them.

A cache is keys and values [B, K, S, H]. A layer that sees a window keeps that alone, as a ring:
position p lies in slot p mod S.
Shape suffixes: B rows, P positions, S slots, N query heads, K key/value heads, G query heads of a
key head, H head_dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from posttrain.models.head import soft_cap
from posttrain.sharding import constrain

CHUNK = 128
"""Slots that are looked at together. A longer cache holds a multiple of it."""
AXES = ("batch", "kv_heads", None, None)
"""The logical dims of a cache."""
_NEGATIVE = -1e30  # a masked score: exp gives exactly 0


def cache_slots(length: int, window: int | None) -> int:
    """How many slots a layer needs for sequences of up to `length`, a multiple of CHUNK."""
    if window is None:
        return length
    multiple = CHUNK if window > CHUNK else 8
    return min(length, -(-window // multiple) * multiple)


def to_cache(x_BPKH: jax.Array, lengths_B: jax.Array, window: int | None) -> jax.Array:
    """Keys or values of whole prompts as their cache lies: [B, K, P or the ring's slots, H].

    lengths_B: how many of the positions are real.
    """
    positions = x_BPKH.shape[1]
    slots = cache_slots(positions, window)
    if slots < positions:
        last = lengths_B[:, None] - 1
        held = last - (last - jnp.arange(slots)) % slots  # the last position that falls on a slot
        x_BPKH = jnp.take_along_axis(x_BPKH, jnp.maximum(held, 0)[:, :, None, None], axis=1)
    return constrain(x_BPKH.swapaxes(1, 2), AXES)


def write(cache: jax.Array, x_B1KH: jax.Array, at_B: jax.Array) -> jax.Array:
    """The cache with the token at each row's position at_B in it."""

    def one(row_KSH: jax.Array, x_1KH: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(row_KSH, x_1KH.swapaxes(0, 1), (0, at, 0))

    return constrain(jax.vmap(one)(cache, x_B1KH, at_B % cache.shape[2]), AXES)


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    at: jax.Array,
    chunks: jax.Array,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention of one new token a row over its cache; float32 softmax.

    q: [B, 1, N, H]; keys, values: caches that hold the token too; at: int32 [B], its position: it
    sees positions 0..at, of these the last `window`. chunks: int32 scalar: no row has a token in a
    later chunk. window, softcap, scale as in attention. Gives [B, 1, N, H].

    Chunk by chunk with a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867). A chunk
    of which a row sees nothing changes not a bit of its result: that depends on no other row.
    """
    heads, slots = keys.shape[1:3]
    size = min(CHUNK, slots)
    q_BKGH = q.reshape(q.shape[0], heads, -1, q.shape[3])
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def chunk(i: jax.Array, carry: Any) -> Any:
        most, total, out = carry
        k, v = (jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=2) for x in (keys, values))
        behind = (at[:, None] - i * size - jnp.arange(size)) % slots
        visible = behind <= at[:, None]
        if window is not None:
            visible &= behind < window
        scores = jnp.einsum("bkgh,bksh->bkgs", q_BKGH, k, preferred_element_type=jnp.float32)
        scores = soft_cap(scores * factor, softcap)
        scores = jnp.where(visible[:, None, None], scores, _NEGATIVE)
        top = jnp.maximum(most, scores.max(-1))
        p, kept = jnp.exp(scores - top[..., None]), jnp.exp(most - top)
        seen = jnp.einsum(
            "bkgs,bksh->bkgh", p.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return top, total * kept + p.sum(-1), out * kept[..., None] + seen

    rows = q_BKGH.shape[:3]
    start = (jnp.full(rows, _NEGATIVE), jnp.zeros(rows), jnp.zeros(q_BKGH.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(0, jnp.minimum(chunks, slots // size), chunk, start)
    return (out / total[..., None]).astype(q.dtype).reshape(q.shape)
