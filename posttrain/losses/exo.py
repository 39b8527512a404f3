"""Exact optimisation: the policy's distribution over a pair's answers against the labels'."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from posttrain.config import semantic
from posttrain.losses.pair_loss import MarginLoss, PairSums


class EXOPair(MarginLoss):
    """The reverse KL from what the policy says of a pair to what its label says.

        q log(q / (1 - e)) + (1 - q) log((1 - q) / e),  q = sigmoid(m)

    with m = r(chosen) - r(rejected), r(y) = beta (log p(y) - log p_ref(y)).
    Source: Ji et al. 2024 (EXO, arXiv:2402.00856), eq. 16 for two answers.
    When: the policy should seek a mode rather than cover both answers. It needs e > 0.
    """

    label_smoothing: float = semantic(
        1e-3, gt=0, lt=0.5, help="e, the probability that the label gives the rejected answer"
    )

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        m, e = self.beta * pairs.margins(), self.label_smoothing
        chosen = jax.nn.sigmoid(m) * (jax.nn.log_sigmoid(m) - jnp.log1p(-e))
        return chosen + jax.nn.sigmoid(-m) * (jax.nn.log_sigmoid(-m) - jnp.log(e))
