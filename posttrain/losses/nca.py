"""Noise-contrastive alignment: each answer against the reference, not only against the other."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from posttrain.losses.pair_loss import PairSums, ReferenceLoss


class NCAPair(ReferenceLoss):
    """The chosen answer is told from the reference's noise, and both answers are held down.

        -log sigmoid(r(chosen)) - (log sigmoid(-r(chosen)) + log sigmoid(-r(rejected))) / 2

    with r(y) = beta (log p(y) - log p_ref(y)).
    Source: Chen et al. 2024 (NCA, arXiv:2402.05369) for two answers.
    When: the probability of the chosen answers should not fall, as it does under DPO.
    """

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        r = self.beta * pairs.ratios
        noise = jax.nn.log_sigmoid(-r).sum(1)
        return -jax.nn.log_sigmoid(r[:, 0]) - noise / 2
