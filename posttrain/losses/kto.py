"""KTO: prospect theory's value of an answer, gains and losses measured from where the policy is."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from posttrain.losses.unpaired import UnpairedLoss, divided, mean_of, ratios_of, twins_of
from posttrain.types import Batch, DataKind, Statistic, TokenOutputs


class KTO(UnpairedLoss):
    """Answers labelled good or bad, each against the policy's mean distance from the reference.

        desirable:  w_d (1 - sigmoid(r - beta z))     other:  w_u (1 - sigmoid(beta z - r))
        r(y) = beta (log p(y) - log p_ref(y)),  z = max(0, mean of log p(y') - log p_ref(y'))

    y' answers another prompt (data.kl_block); z has no gradient and is the mean over all rows of
    the optimiser step, however many micro-batches that has.
    Source: Ethayarajh et al. 2024 (KTO, arXiv:2402.01306), eq. 7.
    When: thumbs up and down instead of pairs. Where one label is rare, choose the weights so that
    w_d n_d / (w_u n_u) is between 1 and 4/3 (eq. 8). It costs two sequences a row.
    """

    data: ClassVar[DataKind] = "twinned"
    coupled: ClassVar[str] = "step"

    def statistic(self, outputs: TokenOutputs, batch: Batch) -> Statistic:
        """The log-ratios of mismatched answers."""
        return {"kl": mean_of(ratios_of(outputs, batch), twins_of(batch))}

    def noted(self, statistic: Statistic) -> dict[str, Any]:
        """kl: z, in nats."""
        return {"kl": jnp.maximum(divided(statistic["kl"]), 0)}

    def shift(self, statistic: Statistic) -> Any:
        return self.beta * self.noted(statistic)["kl"]

    def per_row(self, x: Float[Array, "B S"]) -> Float[Array, "B S"]:
        return 1 - jax.nn.sigmoid(x)
