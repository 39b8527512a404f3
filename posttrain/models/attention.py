"""Causal attention within the segments of packed rows, behind one function.

Every implementation honours segment ids or raises; none is swapped in silently for another.
Shape suffixes: B rows, T positions, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def segment_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """bool [B, 1, T, T]: may query t see key s? Same segment and s <= t.

    Padding (segment 0) sees earlier padding, so that no row of the softmax is empty.
    """
    t = segment_ids_BT.shape[1]
    same = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    return same & jnp.tril(jnp.ones((t, t), bool))


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, implementation: str
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the earlier positions of the same segment; float32 softmax.

    q: [B, T, N, H]; k, v: [B, T, K, H], N a multiple of K; segment_ids: int32 [B, T]. Gives
    [B, T, N, H] in q's dtype.
    """
    return jax.nn.dot_product_attention(
        q, k, v, mask=segment_mask(segment_ids), implementation="xla"
    )


def cached_attention(q: jax.Array, keys: jax.Array, values: jax.Array, at: jax.Array) -> jax.Array:
    """Attention of one new token a row over its cache; float32 softmax.

    q: [B, 1, N, H]; keys, values: [B, S, K, H]; at: int32 [B], the new token's own slot: it sees
    slots 0..at. Gives [B, 1, N, H].
    """
    visible = jnp.arange(keys.shape[1]) <= at[:, None]
    return jax.nn.dot_product_attention(
        q, keys, values, mask=visible[:, None, None, :], implementation="xla"
    )
