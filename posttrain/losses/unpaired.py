"""What losses on answers that are labelled one by one share: no answer has a partner.

A row is an answer with a label, 1 desirable, 0 not. Where the loss takes twinned data, each row
has a mismatched twin, its prompt with another row's answer, which is no term of the loss.

Shape suffixes: B rows of tokens, T positions, S segments of a row.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from posttrain.config import semantic
from posttrain.losses.base import PreferenceLoss
from posttrain.losses.pairs import segment_sums
from posttrain.types import TWIN, Batch, DataKind, Mean, Statistic, Terms, TokenOutputs


def ratios_of(outputs: TokenOutputs, batch: Batch) -> Float[Array, "B S"]:
    """Per segment, the sum over its trained tokens of log p - log p_ref; token by token before the
    sum, which keeps more digits."""
    trained = (batch.loss_weights > 0).astype(jnp.float32)
    return segment_sums((outputs.logps - batch.reference_logps) * trained, batch)


def twins_of(batch: Batch) -> Bool[Array, "B S"]:
    """Which segments are mismatched twins."""
    return batch.labels == TWIN


def mean_of(values: Float[Array, "B S"], which: Bool[Array, "B S"]) -> Mean:
    """Of the segments that are named."""
    return Mean(jnp.where(which, values, 0).sum(), which.astype(jnp.float32).sum())


def divided(mean: Mean) -> Any:
    """The average; 0 of nothing."""
    return mean.total / jnp.maximum(mean.count, 1)


class UnpairedLoss(PreferenceLoss):
    """A loss that is a mean over labelled answers: a term per row, each of weight 1.

    The reward of an answer is r = beta * sum_t (log p(y_t) - log p_ref(y_t)). A term is a function
    of x = r - s for a desirable answer and of x = s - r for another; s, the shift, is what rewards
    are measured against.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logps", "reference_logps", "entropy", "correct"})
    data: ClassVar[DataKind] = "labelled"

    beta: float = semantic(0.1, gt=0, help="how strongly the policy is held to the reference")
    desirable_weight: float = semantic(1.0, gt=0, help="weight of the desirable answers' terms")
    undesirable_weight: float = semantic(1.0, gt=0, help="weight of the others' terms")

    @abstractmethod
    def per_row(self, x: Float[Array, "B S"]) -> Float[Array, "B S"]:
        """The term of an answer whose reward is ahead of the shift, to its label's side, by x."""

    def shift(self, statistic: Statistic) -> Any:
        """s, in the unit of rewards."""
        return jnp.float32(0)

    def noted(self, statistic: Statistic) -> dict[str, Any]:
        """What of the statistic is reported, by name."""
        return {}

    def __call__(
        self, outputs: TokenOutputs, batch: Batch, statistic: Statistic | None = None
    ) -> Terms:
        """A term per row, [B, S], times its label's weight; the mean is over rows.

        Metrics, under TRL's names: rewards/{chosen,rejected} and logps/{chosen,rejected}, means
        over the desirable and over the other answers (whose difference metrics.py makes
        rewards/margins of); rewards/accuracies, the share of answers whose reward is on their
        label's side of the shift; entropy and mean_token_accuracy over trained tokens, the latter's
        of desirable answers. Twins are in none of them.
        """
        given = statistic or {}
        trained = (batch.loss_weights > 0).astype(jnp.float32)
        rewards = self.beta * ratios_of(outputs, batch)
        logps, entropy, right, tokens = (
            segment_sums(x * trained, batch)
            for x in (outputs.logps, outputs.entropy, outputs.correct, jnp.ones_like(trained))
        )
        good, bad = batch.labels == 1, batch.labels == 0
        ahead = jnp.where(good, 1.0, -1.0) * (rewards - self.shift(given))
        weight = jnp.where(good, self.desirable_weight, self.undesirable_weight)
        metrics = {
            "rewards/chosen": mean_of(rewards, good),
            "rewards/rejected": mean_of(rewards, bad),
            "rewards/accuracies": mean_of((ahead > 0).astype(jnp.float32), good | bad),
            "logps/chosen": mean_of(logps, good),
            "logps/rejected": mean_of(logps, bad),
            "entropy": Mean(*(mean_of(x, good | bad).total for x in (entropy, tokens))),
            "mean_token_accuracy": Mean(*(mean_of(x, good).total for x in (right, tokens))),
        }
        rows = (good | bad).astype(jnp.float32)
        # the same for all rows of a step; over several steps, as of an evaluation, by their rows
        noted = self.noted(given)
        metrics |= {name: Mean(value * rows.sum(), rows.sum()) for name, value in noted.items()}
        source_ids = jnp.where(good | bad, batch.source_ids, -1)
        return Terms(weight * self.per_row(ahead), rows, source_ids, metrics)
