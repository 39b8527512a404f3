"""From logits to a token: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """How to draw. Scalars on device: another temperature needs no compilation."""

    temperature: Any  # float32 > 0; not read when greedy
    top_k: Any  # int32; 0 = all
    top_p: Any  # float32 in (0, 1]


def filter_logits(logits_BV: jax.Array, choice: Choice) -> jax.Array:
    """Logits with all but the kept tokens at -inf; logits are already divided by temperature.

    Kept: the top_k most probable, and of those the smallest set whose probability (of the top_k
    renormalised) reaches top_p; the most probable token always. Equal logits at the edge of top_k
    are all kept. Holtzman et al. 2020 (top-p), Fan et al. 2018 (top-k).
    """
    vocab = logits_BV.shape[-1]
    ordered = jnp.sort(logits_BV, axis=-1, descending=True)
    k = jnp.where(choice.top_k > 0, jnp.minimum(choice.top_k, vocab), vocab)
    kth = jnp.take_along_axis(ordered, jnp.full((*logits_BV.shape[:-1], 1), k - 1), axis=-1)
    ordered = jnp.where(ordered >= kth, ordered, -jnp.inf)
    p = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    kept = jnp.where(before < choice.top_p, ordered, jnp.inf)
    least = kept.at[..., 0].set(ordered[..., 0]).min(axis=-1, keepdims=True)
    return jnp.where(logits_BV >= jnp.maximum(least, kth), logits_BV, -jnp.inf)


def choose(
    logits_BV: jax.Array,
    choice: Choice,
    key: jax.Array,
    steps_B: jax.Array,
    *,
    greedy: bool,
    filtered: bool,
) -> jax.Array:
    """int32 [B]: one token a row. The draw of row b depends on key, b and steps_B[b] alone."""
    if greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled = logits_BV / choice.temperature
    if filtered:
        scaled = filter_logits(scaled, choice)

    def draw(row: jax.Array, step: jax.Array, logits_V: jax.Array) -> jax.Array:
        return jax.random.categorical(
            jax.random.fold_in(jax.random.fold_in(key, row), step), logits_V
        )

    rows = jnp.arange(logits_BV.shape[0])
    return jax.vmap(draw)(rows, steps_B, scaled).astype(jnp.int32)
