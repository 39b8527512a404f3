"""ORPO: supervised fine-tuning with a penalty on the odds of the rejected answer."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from posttrain.config import semantic
from posttrain.losses.pair_loss import FreeLoss, PairSums

_CERTAIN = -1e-6  # a log-probability above this is taken for it: the odds of 1 are infinite


class ORPO(FreeLoss):
    """The NLL of the chosen answer, and the log odds ratio of the two.

        w (-log p(chosen)) / |chosen| - beta log sigmoid(o(chosen) - o(rejected))
        o(y) = log(P / (1 - P)),  P = exp(log p(y) / |y|)

    Source: Hong et al. 2024 (ORPO, arXiv:2403.07691), eq. 4-7; beta is its lambda, w is nll_weight.
    When: one stage from a base model, with no SFT before it.
    """

    normalised: ClassVar[bool] = True

    beta: float = semantic(0.1, gt=0, help="weight of the odds ratio")
    nll_weight: float = semantic(
        1.0, ge=0, help="weight of the chosen answer's negative log-likelihood per token"
    )

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        log_p = jnp.minimum(pairs.logps / pairs.tokens, _CERTAIN)
        odds = log_p - jnp.log(-jnp.expm1(log_p))
        return -self.beta * jax.nn.log_sigmoid(odds[:, 0] - odds[:, 1])
