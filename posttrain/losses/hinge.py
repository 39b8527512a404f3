"""The hinge loss of the margin between the two answers of a pair."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from posttrain.losses.pair_loss import MarginLoss, PairSums


class Hinge(MarginLoss):
    """A pair counts until its margin is 1, and no longer.

        max(0, 1 - m),  m = r(chosen) - r(rejected),  r(y) = beta (log p(y) - log p_ref(y))

    Source: SLiC (Zhao et al. 2023, arXiv:2305.10425) with the reference of RSO (Liu et al.
    2023, arXiv:2309.06657).
    When: pairs that are told apart should not be pushed on. beta is RSO's gamma, and 1 / beta the
    margin of log-ratios past which a pair counts no more (SLiC's delta).
    """

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        return jax.nn.relu(1 - self.beta * pairs.margins())
