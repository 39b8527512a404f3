"""SimPO: the mean log-probability of an answer is its reward, and there is no reference."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Array, Float

from posttrain.config import semantic
from posttrain.losses.pair_loss import FreeLoss, PairSums, smoothed_logistic


class SimPO(FreeLoss):
    """Rewards per token, apart by a margin.

        -log sigmoid(r(chosen) - r(rejected) - gamma),  r(y) = beta log p(y) / |y|

    Source: Meng et al. 2024 (SimPO, arXiv:2405.14734), eq. 6.
    When: no memory or time for a reference. It is sensitive to the learning rate (3e-7 to 1e-6) and
    has nothing that holds it to the model it started from.
    """

    normalised: ClassVar[bool] = True

    beta: float = semantic(2.0, gt=0, help="scale of the rewards")
    gamma: float = semantic(1.0, ge=0, help="how far apart the rewards should be")
    label_smoothing: float = semantic(
        0.0, ge=0, lt=0.5, help="share of pairs taken to be labelled the wrong way round"
    )

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        rewards = self.rewards(pairs)
        margins = rewards[:, 0] - rewards[:, 1] - self.gamma
        return smoothed_logistic(margins, self.label_smoothing)
