"""Binary classifier optimisation: rewards are the logits of a classifier of answers."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from posttrain.losses.pair_loss import PairSums, ReferenceLoss
from posttrain.losses.unpaired import UnpairedLoss, divided, mean_of, ratios_of
from posttrain.types import Batch, Statistic, TokenOutputs


class BCOPair(ReferenceLoss):
    """Chosen answers are classified as good, rejected ones as bad.

        -log sigmoid(r(chosen)) - log sigmoid(-r(rejected)),  r(y) = beta (log p(y) - log p_ref(y))

    Source: Jung et al. 2024 (BCO, arXiv:2404.04656), without its reward shift.
    When: pairs whose sides should be judged each by itself; `bco` for answers without a partner.
    """

    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        r = self.beta * pairs.ratios
        return -jax.nn.log_sigmoid(r[:, 0]) - jax.nn.log_sigmoid(-r[:, 1])


class BCO(UnpairedLoss):
    """Answers labelled good or bad are classified by their rewards, from half-way between the two.

        desirable:  -w_d log sigmoid(r - d)     other:  -w_u log sigmoid(d - r)
        r(y) = beta (log p(y) - log p_ref(y)),  d = (mean of r, desirable + mean of r, other) / 2

    d has no gradient and is of all rows of the optimiser step; where a step has answers of one
    label alone, it is their mean. The paper keeps a moving average of it over steps instead, and
    may weigh undesirable answers by how like the others' prompts theirs are: neither is done here.
    Source: Jung et al. 2024 (BCO, arXiv:2404.04656).
    When: as `kto`, at half the cost a row; many rows a step, since d is noisy otherwise.
    """

    coupled: ClassVar[str] = "step"

    def statistic(self, outputs: TokenOutputs, batch: Batch) -> Statistic:
        """The rewards of each label."""
        rewards = self.beta * ratios_of(outputs, batch)
        labels = {"desirable": 1, "undesirable": 0}
        return {name: mean_of(rewards, batch.labels == label) for name, label in labels.items()}

    def noted(self, statistic: Statistic) -> dict[str, Any]:
        """delta: d, in the unit of rewards."""
        good, bad = statistic["desirable"], statistic["undesirable"]
        labels = (good.count > 0).astype(jnp.float32) + (bad.count > 0)
        return {"delta": (divided(good) + divided(bad)) / jnp.maximum(labels, 1)}

    def shift(self, statistic: Statistic) -> Any:
        return self.noted(statistic)["delta"]

    def per_row(self, x: Float[Array, "B S"]) -> Float[Array, "B S"]:
        return -jax.nn.log_sigmoid(x)
