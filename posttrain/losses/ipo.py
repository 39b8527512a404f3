"""Squared errors: log-ratios are brought to a finite target instead of being pushed for ever."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from posttrain.config import semantic
from posttrain.losses.pair_loss import MarginLoss, PairSums, ReferenceLoss

_FARTHEST = 1e15


class IPO(MarginLoss):
    """The margin of mean log-ratios is brought to 1 / (2 beta).

        (s(chosen) / |chosen| - s(rejected) / |rejected| - 1 / (2 beta))^2,  s = log p - log p_ref

    Source: Azar et al. 2023 (arXiv:2310.12036), eq. 17, whose tau is beta; log-ratios per token, as
    its authors have said that they took them.
    When: preferences are nearly deterministic, and DPO overfits. beta is a target, not a
    temperature: a smaller one asks for a larger margin.
    """

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        # of other divergences margins may be near float32's end, and squares past it
        margins = jnp.clip(pairs.margins(normalised=True), -_FARTHEST, _FARTHEST)
        return (margins - 0.5 / self.beta) ** 2


class SPPOHard(ReferenceLoss):
    """The log-ratio of each answer is brought to its own target.

        (s(chosen) - 1 / (2 beta))^2 + (s(rejected) + 1 / (2 beta))^2,  s = log p - log p_ref

    Source: Wu et al. 2024 (SPPO, arXiv:2405.00675), eq. 4.7 with the probability of winning set to
    1 for the chosen and 0 for the rejected answer; beta is its 1 / eta, and 0.001 its setting.
    When: self-play, where both answers are the model's own of this round.
    """

    beta: float = semantic(0.001, gt=0, help="how strongly the policy is held to the reference")

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        target = 0.5 / self.beta
        return (pairs.ratios[:, 0] - target) ** 2 + (pairs.ratios[:, 1] + target) ** 2
