"""Anchored preference optimisation: which way each answer of a pair should move, not only apart."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from posttrain.losses.pair_loss import PairSums, ReferenceLoss
from posttrain.losses.unpaired import UnpairedLoss


class APOZero(ReferenceLoss):
    """The chosen answer becomes more probable, the rejected one less.

        1 - sigmoid(r(chosen)) + sigmoid(r(rejected)),  r(y) = beta (log p(y) - log p_ref(y))

    Source: D'Oosterlinck et al. 2024 (APO, arXiv:2408.06266), eq. 7.
    When: the chosen answers are better than what the model says by itself.
    """

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        good, bad = jax.nn.sigmoid(self.beta * pairs.ratios).T
        return 1 - good + bad


class APODown(ReferenceLoss):
    """Both answers become less probable, the rejected one the more.

        sigmoid(r(chosen)) + 1 - sigmoid(r(chosen) - r(rejected))

    with r(y) = beta (log p(y) - log p_ref(y)).
    Source: D'Oosterlinck et al. 2024 (APO, arXiv:2408.06266), eq. 8.
    When: the chosen answers are worse than what the model says by itself.
    """

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        r = self.beta * pairs.ratios
        return jax.nn.sigmoid(r[:, 0]) + 1 - jax.nn.sigmoid(r[:, 0] - r[:, 1])


class APOZeroUnpaired(UnpairedLoss):
    """`apo_zero` of answers labelled good or bad.

        desirable:  w_d (1 - sigmoid(r))     other:  w_u sigmoid(r)

    with r(y) = beta (log p(y) - log p_ref(y)).
    Source: D'Oosterlinck et al. 2024 (APO, arXiv:2408.06266), eq. 7, a label at a time.
    When: as `kto`, where good answers are better than what the model says by itself; half its cost.
    """

    def per_row(self, x: Float[Array, "B S"]) -> Float[Array, "B S"]:
        return 1 - jax.nn.sigmoid(x)
