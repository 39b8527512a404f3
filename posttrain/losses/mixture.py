"""Several pair losses at once, with weights; and every loss that `posttrain preference` takes."""

from __future__ import annotations

from typing import Annotated

import jax.numpy as jnp
from pydantic import field_validator

from posttrain.config import Config, semantic, variant
from posttrain.losses import PAIR_LOSSES, UNPAIRED_LOSSES
from posttrain.losses.base import PreferenceLoss
from posttrain.losses.pair_loss import PairLoss
from posttrain.types import Batch, Mean, Terms, TokenOutputs


class Part(Config):
    """One loss of a mixture."""

    weight: float = semantic(1.0, gt=0, help="what its terms are multiplied by")
    loss: Annotated[PairLoss, variant(PAIR_LOSSES)] = semantic(help="a loss on pairs")

    @field_validator("loss")
    @classmethod
    def _alone(cls, loss: PairLoss) -> PairLoss:
        if hasattr(loss, "statistic"):
            raise ValueError(f"{type(loss).__name__} needs a statistic of the step: use it alone")
        return loss


class Mixture(PreferenceLoss):
    """A weighted sum of losses of the same pairs.

        sum_k weight_k loss_k

    Source: MPO (Wang et al. 2024, arXiv:2411.10442), eq. 1, mixes so: `dpo` 0.8, `bco_pair` 0.2,
    and the NLL term 1 (of the first part, whose weight counts: nll_weight 1.25).
    When: losses that pull at different things, as which answer is better and how good each is.
    Rewards and log-probs are reported as the first part has them; loss_parts/<name> is each part's.
    """

    parts: tuple[Part, ...] = semantic(help="the losses and their weights")

    @field_validator("parts")
    @classmethod
    def _some(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        if not parts:
            raise ValueError("no part: name a loss, as in [{weight: 1, loss: {type: dpo}}]")
        return parts

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What any part reads."""
        return frozenset().union(*(part.loss.needs for part in self.parts))

    @property
    def coupled(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the parts are."""
        return max((part.loss.coupled for part in self.parts), key=len)

    def __call__(self, outputs: TokenOutputs, batch: Batch) -> Terms:
        """A term per pair, [P], each of weight 1."""
        made = [part.loss(outputs, batch) for part in self.parts]
        first = made[0]
        metrics = dict(first.metrics)
        for k, (part, terms) in enumerate(zip(self.parts, made, strict=True)):
            mean = Mean((terms.values * terms.weights).sum(), terms.weights.sum())
            metrics[f"loss_parts/{k}_{_name(part.loss)}"] = mean
        values = sum(
            part.weight * terms.values for part, terms in zip(self.parts, made, strict=True)
        )
        return Terms(jnp.asarray(values), first.weights, first.source_ids, metrics)


def _name(loss: PairLoss) -> str:
    known = (name for name, made in PAIR_LOSSES.items() if made is type(loss))
    return next(known, type(loss).__name__)


PREFERENCE_LOSSES: dict[str, type[PreferenceLoss]] = {
    **PAIR_LOSSES,
    "mixture": Mixture,
    **UNPAIRED_LOSSES,
}
