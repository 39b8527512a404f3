"""Direct preference optimisation and its kin: a logistic loss of the margin between the two answers
of a pair, each measured against what a reference model says of it.

    r(y) = beta * sum_t (log p(y_t | x, y_<t) - log p_ref(y_t | x, y_<t))
    m = r(chosen) - r(rejected)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from posttrain.config import semantic
from posttrain.losses.pair_loss import MarginLoss, PairSums, smoothed_logistic


class DPO(MarginLoss):
    """Sigmoid DPO.

        -(1 - e) log sigmoid(m) - e log sigmoid(-m)

    with m = r(chosen) - r(rejected), r(y) = beta (log p(y) - log p_ref(y)).
    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; with e > 0 conservative DPO (Mitchell,
    "A note on DPO with noisy preferences", 2023, eq. 3); with nll_weight RPO (Pang et al. 2024,
    arXiv:2404.19733, eq. 1, whose alpha is 1 / nll_weight).
    When: first. A few per cent of smoothing where labels are noisy, an NLL term where the chosen
    answers lose probability together with the rejected ones.
    """

    label_smoothing: float = semantic(
        0.0, ge=0, lt=0.5, help="e, the share of pairs taken to be labelled the wrong way round"
    )

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        return smoothed_logistic(self.beta * pairs.margins(), self.label_smoothing)


class RobustDPO(MarginLoss):
    """DPO made unbiased for labels that are flipped with a known rate.

        (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e)

    with m as in `dpo`.
    Source: Chowdhury et al. 2024 (arXiv:2403.00409).
    When: the rate of flipped labels is known, by labelling twice say; else `dpo` with
    label_smoothing, which is bounded below.
    """

    label_smoothing: float = semantic(
        0.1, ge=0, lt=0.5, help="e, the share of pairs that are labelled the wrong way round"
    )

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        e, m = self.label_smoothing, self.beta * pairs.margins()
        return (-(1 - e) * jax.nn.log_sigmoid(m) + e * jax.nn.log_sigmoid(-m)) / (1 - 2 * e)


class SigmoidNorm(MarginLoss):
    """Length-normalised DPO: the margin of rewards per token.

        -log sigmoid(r(chosen) / |chosen| - r(rejected) / |rejected|)

    with r(y) = beta (log p(y) - log p_ref(y)).
    Source: Lambert et al. 2024 (Tulu 3, arXiv:2411.15124), `dpo_norm` in open-instruct.
    When: `dpo` makes answers longer. beta is of another size than DPO's: Tulu 3 took 5.
    """

    beta: float = semantic(5.0, gt=0, help="how strongly the policy is held to the reference")

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        return -jax.nn.log_sigmoid(self.beta * pairs.margins(normalised=True))


class DiscoPOP(MarginLoss):
    """A blend of logistic and exponential loss that a language model proposed.

        (1 - w) (-log sigmoid(m)) + w exp(-m),  w = sigmoid(m / tau)

    with m as in `dpo`.
    Source: Lu et al. 2024 (DiscoPOP, arXiv:2406.08414), eq. 5 ("log-ratio modulated loss").
    When: as an alternative to `dpo` in a sweep. It is not convex: between m = -0.12 and 0.07 (of
    tau 0.05) it rises, so that a pair a little on the wrong side is held there.
    """

    tau: float = semantic(0.05, gt=0, help="width of the blend, in units of the margin")

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        m = self.beta * pairs.margins()
        blend = jax.nn.sigmoid(m / self.tau)
        # where e^-m overflows, its share is 0: 0 and not 0 * inf
        exponential = jnp.exp(-jnp.maximum(m, -80.0))
        return -(1 - blend) * jax.nn.log_sigmoid(m) + blend * exponential
