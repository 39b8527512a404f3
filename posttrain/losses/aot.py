"""Alignment by optimal transport: distributions of rewards are compared, not answers one by one."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import field_validator

from posttrain.config import semantic
from posttrain.losses.pair_loss import PairSums, ReferenceLoss, smoothed_logistic

_LAST = 1e30  # sorts behind every value, and its differences are no NaN


class AOT(ReferenceLoss):
    """The policy's margins, sorted, above the reference's, sorted.

        -(1 - e) log sigmoid(beta d_i) - e log sigmoid(-beta d_i),  d_i = a_(i) - b_(i)

    a = log p(chosen) - log p(rejected), b the same of the reference, (i): the i-th smallest of the
    micro-batch. Where a step has several micro-batches (batch.accumulate), each sorts its own.
    Source: Melnyk et al. 2024 (AOT, arXiv:2406.05882), paired, with the logistic loss.
    When: the whole distribution of margins should move. Use micro-batches of many pairs.
    """

    coupled: ClassVar[str] = "micro-batch"

    label_smoothing: float = semantic(
        0.0, ge=0, lt=0.5, help="e, the share of pairs taken to be labelled the wrong way round"
    )

    @field_validator("use_weighting")
    @classmethod
    def _unweighted(cls, value: bool) -> bool:
        if value:
            raise ValueError("pairs are sorted, so that no term belongs to one pair: leave it out")
        return value

    def compared(self, pairs: PairSums) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
        """What is to be the larger, and what the smaller."""
        policy, reference = pairs.logps, pairs.logps - pairs.ratios
        return policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        larger, smaller = (jnp.sort(jnp.where(pairs.real, x, _LAST)) for x in self.compared(pairs))
        # the pairs that are there come first, and so they do when sorted
        apart = jnp.where(pairs.real, larger - smaller, 0)
        return smoothed_logistic(self.beta * apart, self.label_smoothing)


class AOTUnpaired(AOT):
    """The rewards of all chosen answers, sorted, above those of all rejected ones, sorted.

        -(1 - e) log sigmoid(d_i) - e log sigmoid(-d_i),  d_i = r(chosen)_(i) - r(rejected)_(i)

    with r(y) = beta (log p(y) - log p_ref(y)), (i): the i-th smallest of the micro-batch. Where a
    step has several micro-batches (batch.accumulate), each sorts its own.
    Source: Melnyk et al. 2024 (AOT, arXiv:2406.05882), unpaired, with the logistic loss.
    When: as `aot`; which rejected answer belongs to which chosen one does not matter here.
    """

    def compared(self, pairs: PairSums) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
        return pairs.ratios[:, 0], pairs.ratios[:, 1]
