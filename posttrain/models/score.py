"""The scalar head: of a reward model one number for each segment, read at its last token; of a
critic one for each token, read at the token before it.

Where a segment begins and ends, the segment ids say: which token stands there, whether it is also
the padding token, and on which side the padding lies, has no part in it.

Shape suffixes: B rows, T positions, S segments of a row, D embed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def segment_scores(
    hidden_BTD: Float[Array, "B T D"],
    w_D1: Float[Array, "D 1"],
    segment_ids_BT: Int[Array, "B T"],
    segments: int,
) -> Float[Array, "B S"]:
    """hidden . w at the last token of each segment 1..segments, float32; 0 where there is none.

    hidden_BTD: after the final norm. A segment is one run of positions. The product is float32
    whatever the hidden states are: it is D numbers a segment, and rewards are differences.
    """
    value_BT = _product(hidden_BTD, w_D1)
    after_BT = jnp.pad(segment_ids_BT[:, 1:], ((0, 0), (0, 1)))
    # a sum in which one term is not 0: exact, and nothing but [B, S] leaves the row's shard
    number = jnp.arange(1, segments + 1)
    ends_BTS = (segment_ids_BT[:, :, None] == number) & (after_BT[:, :, None] != number)
    return jnp.where(ends_BTS, value_BT[:, :, None], 0.0).sum(1)


def token_values(
    hidden_BTD: Float[Array, "B T D"], w_D1: Float[Array, "D 1"], segment_ids_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """At each token, hidden . w at the token before it in its segment, float32.

    So a token's value is that of the state in which it was drawn, and knows nothing of it. The
    first token of a segment, which nothing stands before, has 0, and so has padding.
    """
    value_BT = jnp.pad(_product(hidden_BTD, w_D1)[:, :-1], ((0, 0), (1, 0)))
    before_BT = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    return jnp.where((segment_ids_BT > 0) & (segment_ids_BT == before_BT), value_BT, 0.0)


def _product(hidden_BTD: Float[Array, "B T D"], w_D1: Float[Array, "D 1"]) -> Float[Array, "B T"]:
    """float32, whatever the hidden states are."""
    return jnp.einsum(
        "btd,d->bt",
        hidden_BTD.astype(jnp.float32),
        w_D1[:, 0].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
