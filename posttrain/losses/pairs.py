"""Preference pairs out of packed rows: sums over segments, and both sides of each pair together.

A pair's sides are two segments anywhere in a micro-batch: in one row, in two, on two devices or
two hosts. What is known of a segment is one number, so that all of them, [B, S], are a few KB:
they are gathered over the mesh and joined by pair number on every device alike. No gradient of
anything larger crosses.

Shape suffixes: B rows, T positions, S segments of a row, P pairs that a micro-batch has room for.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from posttrain.sharding import constrain
from posttrain.types import Batch


def segment_sums(values: Float[Array, "B T"], batch: Batch) -> Float[Array, "B S"]:
    """Per segment, the sum of its tokens' values, in float32. A segment that is not there: 0."""
    number = jnp.arange(1, batch.example_ids.shape[-1] + 1)
    inside_BTS = batch.segment_ids[:, :, None] == number  # fused into the sum, never in memory
    return jnp.where(inside_BTS, values.astype(jnp.float32)[:, :, None], 0.0).sum(1)


def to_tokens(values: Float[Array, "B S"], batch: Batch) -> Float[Array, "B T"]:
    """Each token's value of its segment; padding has the first segment's."""
    return jnp.take_along_axis(values, jnp.maximum(batch.segment_ids - 1, 0), axis=1)


def positions_in_answer(
    trained: Float[Array, "B T"], tokens: Float[Array, "B S"], batch: Batch
) -> Float[Array, "B T"]:
    """Of trained tokens: the how manyth of their segment they are, from 1. tokens: how many each
    segment has. Segments lie in a row in the order of their numbers."""
    before_BS = jnp.cumsum(tokens, 1) - tokens
    return jnp.cumsum(trained, 1) - to_tokens(before_BS, batch)


@dataclass(frozen=True)
class Sides:
    """Which segments are the pairs of a micro-batch.

    segments[p] are the flat indices (into [B * S]) of pair p's chosen and rejected side. P is
    B * S // 2, more than there are: real[p] says whether there is a pair p.
    """

    segments: Int[Array, "P 2"]
    real: Bool[Array, " P"]

    def of(self, values: Shaped[Array, "B S"]) -> Shaped[Array, "P 2"]:
        """Each pair's value of its chosen side and of its rejected side; gathered over the mesh.

        Where there is no pair: some segments' values, for a weight of 0.
        """
        return constrain(values, (None, None)).reshape(-1)[self.segments]

    def back(self, values: Float[Array, " P"], batch: Batch) -> Float[Array, "B S"]:
        """Each pair's value at both of its segments, 0 at what is no segment."""
        shape = batch.pair_ids.shape
        flat = jnp.zeros(shape[0] * shape[1], values.dtype)
        values = jnp.where(self.real, values, 0)
        both = flat.at[self.segments].set(jnp.stack([values, values], 1), unique_indices=True)
        return constrain(both.reshape(shape), ("batch", None))


def find_sides(batch: Batch) -> Sides:
    """The pairs of one micro-batch, from its pair_ids and chosen."""
    pair = constrain(batch.pair_ids, (None, None)).reshape(-1)
    chosen = constrain(batch.chosen, (None, None)).reshape(-1)
    # By pair, the chosen side first, what is no segment last: two that are neighbours are a pair.
    key = jnp.where(pair < 0, 2 * pair.size, 2 * pair + ~chosen)
    segments = jnp.argsort(key)[: pair.size // 2 * 2].reshape(-1, 2)
    return Sides(segments, pair[segments[:, 0]] >= 0)
