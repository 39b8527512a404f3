"""CPO: DPO whose reference is taken to be uniform, beside imitation of the chosen answers."""

from __future__ import annotations

from jaxtyping import Array, Float

from posttrain.config import semantic
from posttrain.losses.pair_loss import FreeLoss, PairSums, smoothed_logistic


class CPO(FreeLoss):
    """A logistic loss of the answers' log-probabilities, and the NLL of the chosen one.

        -log sigmoid(r(chosen) - r(rejected)) + w (-log p(chosen)) / |chosen|,  r(y) = beta log p(y)

    Source: Xu et al. 2024 (CPO, arXiv:2401.08417); w is nll_weight.
    When: no memory or time for a reference, and the chosen answers are worth imitating.
    """

    nll_weight: float = semantic(
        1.0, ge=0, help="weight of the chosen answer's negative log-likelihood per token"
    )
    label_smoothing: float = semantic(
        0.0, ge=0, lt=0.5, help="share of pairs taken to be labelled the wrong way round"
    )

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        rewards = self.rewards(pairs)
        return smoothed_logistic(rewards[:, 0] - rewards[:, 1], self.label_smoothing)
