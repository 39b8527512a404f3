"""What losses on preference pairs share: the sums they are functions of, what can be switched on
beside them, and what they report. A loss of the family is a class with a `per_pair`.

Shape suffixes as in pairs.py; [P, 2]: the chosen side, then the rejected one.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import model_validator

from posttrain.config import semantic
from posttrain.losses.base import PreferenceLoss
from posttrain.losses.pairs import Sides, find_sides, positions_in_answer, segment_sums, to_tokens
from posttrain.types import Batch, Mean, Terms, TokenOutputs

_EXP_LIMIT = 80.0  # e^80 is near float32's largest number: past it a divergence's slope is 0


@dataclass(frozen=True)
class PairSums:
    """What a loss sees of the pairs of a micro-batch, float32, [P, 2] each, in nats.

    logps: log-probability of an answer, the sum over its trained tokens. tokens: their number, at
    least 1. ratios: the same sum of log p - log p_ref. Both are weighted by ld_alpha, where that is
    set. scores: ratios as the f-divergence has them (the same under reverse KL). The last two are
    None where there is no reference. real [P]: whether there is such a pair; those that are there
    come first. Where there is none, the values are some segments', for a weight of 0.
    """

    logps: Any
    tokens: Any
    real: Any
    ratios: Any = None
    scores: Any = None

    def margins(self, *, normalised: bool = False) -> Float[Array, " P"]:
        """The chosen side's score less the rejected one's, each per token if so wanted."""
        scores = self.scores / self.tokens if normalised else self.scores
        return scores[:, 0] - scores[:, 1]


class PairLoss(PreferenceLoss):
    """A loss that is a mean over pairs: a term per pair, each of weight 1."""

    nll_weight: float = semantic(
        0.0, ge=0, help="weight of the chosen answer's negative log-likelihood per token (RPO)"
    )

    @abstractmethod
    def per_pair(self, pairs: PairSums) -> Float[Array, " P"]:
        """The loss of each pair."""

    @abstractmethod
    def rewards(self, pairs: PairSums) -> Float[Array, "P 2"]:
        """What is reported as the reward that each answer has by this loss."""

    def counted(
        self, batch: Batch, sides: Sides, tokens: Float[Array, "B S"]
    ) -> Float[Array, "B T"]:
        """How much each token counts in its answer's sums: 1 if it is trained, else 0."""
        return (batch.loss_weights > 0).astype(jnp.float32)

    def weigh(
        self, losses: Float[Array, " P"], outputs: TokenOutputs, batch: Batch, sides: Sides
    ) -> Float[Array, " P"]:
        """The losses times the weights of their pairs: all 1 here."""
        return losses

    def __call__(self, outputs: TokenOutputs, batch: Batch) -> Terms:
        """A term per pair, [P], each of weight 1. Every trained token (weight > 0) counts once.

        Metrics, under TRL's names: rewards/{chosen,rejected,margins,accuracies} and
        logps/{chosen,rejected}, means over pairs of `rewards`, their difference, whether it is
        positive, and the answers' log-probabilities; entropy over the trained tokens of both sides;
        mean_token_accuracy over those of the chosen side; nll_loss, where it has a weight.
        """
        trained = (batch.loss_weights > 0).astype(jnp.float32)
        sides = find_sides(batch)
        tokens_BS = segment_sums(trained, batch)
        tokens = sides.of(tokens_BS)
        right = sides.of(segment_sums(outputs.correct * trained, batch))
        counted = self.counted(batch, sides, tokens_BS)
        ratios = scores = None
        if "reference_logps" in self.needs:
            # Token by token before the sum: the difference of two sums of hundreds of nats would
            # keep fewer digits than the sum of the differences.
            ratio_BT = (outputs.logps - batch.reference_logps) * counted
            ratios = sides.of(segment_sums(ratio_BT, batch))
            scores = self.scores(ratios)
        pairs = PairSums(
            logps=sides.of(segment_sums(outputs.logps * counted, batch)),
            tokens=jnp.maximum(tokens, 1),
            real=sides.real,
            ratios=ratios,
            scores=scores,
        )
        real = sides.real.astype(jnp.float32)
        losses = self.weigh(self.per_pair(pairs), outputs, batch, sides)
        rewards = self.rewards(pairs)
        margins = rewards[:, 0] - rewards[:, 1]
        of_pairs = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).astype(jnp.float32),
            "logps/chosen": pairs.logps[:, 0],
            "logps/rejected": pairs.logps[:, 1],
        }
        if self.nll_weight:
            whole = sides.of(segment_sums(outputs.logps * trained, batch))
            of_pairs["nll_loss"] = -whole[:, 0] / pairs.tokens[:, 0]
            losses += self.nll_weight * of_pairs["nll_loss"]
        metrics = {name: Mean((x * real).sum(), real.sum()) for name, x in of_pairs.items()}
        metrics["entropy"] = Mean((outputs.entropy * trained).sum(), trained.sum())
        metrics["mean_token_accuracy"] = Mean(
            (right[:, 0] * real).sum(), (tokens[:, 0] * real).sum()
        )
        source_ids = jnp.where(sides.real, sides.of(batch.source_ids)[:, 0], -1)
        return Terms(losses, real, source_ids, metrics)

    def scores(self, ratios: Float[Array, "P 2"]) -> Float[Array, "P 2"]:
        """The ratios as the loss compares them."""
        return ratios


class FreeLoss(PairLoss):
    """A loss that asks no reference. The reward is beta times an answer's log-probability."""

    beta: float = semantic(0.1, gt=0, help="scale of the rewards")
    normalised: ClassVar[bool] = False

    def rewards(self, pairs: PairSums) -> Float[Array, "P 2"]:
        return self.beta * (pairs.logps / pairs.tokens if self.normalised else pairs.logps)


class ReferenceLoss(PairLoss):
    """A loss that measures answers against a reference: the reward is beta * (log p - log p_ref).

    ld_alpha (LD-DPO; Liu et al. 2024, arXiv:2409.06411): tokens of an answer past the
    length of the shorter one count by this much, so that a longer answer is not preferred for being
    long. use_weighting (WPO; Zhou et al. 2024, arXiv:2406.11827, eq. 2 with the sampled alignment):
    a pair's loss is multiplied by w(chosen) w(rejected), with no gradient, where w is the exponent
    of the mean over an answer's tokens of log p(y_t) - log sum_v p(v)^2: answers that the policy
    would hardly give count less.
    """

    beta: float = semantic(0.1, gt=0, help="how strongly the policy is held to the reference")
    ld_alpha: float | None = semantic(
        None, ge=0, le=1, help="how much tokens past the shorter answer's length count (LD-DPO)"
    )
    use_weighting: bool = semantic(
        False, help="weigh pairs by how probable the policy finds their answers (WPO)"
    )

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What it reads; more if pairs are weighed."""
        always = frozenset({"logps", "reference_logps", "entropy", "correct"})
        return always | {"log_sum_sq"} if self.use_weighting else always

    def rewards(self, pairs: PairSums) -> Float[Array, "P 2"]:
        return self.beta * pairs.ratios

    def counted(
        self, batch: Batch, sides: Sides, tokens: Float[Array, "B S"]
    ) -> Float[Array, "B T"]:
        trained = (batch.loss_weights > 0).astype(jnp.float32)
        if self.ld_alpha is None:
            return trained
        shared_BT = to_tokens(sides.back(sides.of(tokens).min(1), batch), batch)
        past = positions_in_answer(trained, tokens, batch) > shared_BT
        return trained * jnp.where(past, self.ld_alpha, 1.0)

    def weigh(
        self, losses: Float[Array, " P"], outputs: TokenOutputs, batch: Batch, sides: Sides
    ) -> Float[Array, " P"]:
        if not self.use_weighting:
            return losses
        trained = (batch.loss_weights > 0).astype(jnp.float32)
        aligned_BT = jax.lax.stop_gradient(outputs.logps - outputs.log_sum_sq) * trained
        sums, tokens = (sides.of(segment_sums(x, batch)) for x in (aligned_BT, trained))
        return losses * jnp.exp((sums / jnp.maximum(tokens, 1)).sum(1))


class MarginLoss(ReferenceLoss):
    """A function of the margin s(chosen) - s(rejected), where s is the reward over beta.

    Only here can another divergence than reverse KL hold the policy to the reference (Wang et al.
    2023, arXiv:2309.16240, table 1): s = f'(p / p_ref), and the term that depends on the prompt
    alone cancels. forward_kl: 1 - p_ref/p; js_divergence: log 2p/(p + p_ref); alpha_divergence:
    ((p/p_ref)^(a-1) - 1) / (a - 1), the paper's alpha being 1 - a: a = 1 is reverse KL, 0 forward.
    """

    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        semantic("reverse_kl", help="what holds the policy to the reference (f-DPO)")
    )
    f_alpha: float = semantic(0.5, help="a of alpha_divergence; 1: reverse KL, 0: forward KL")

    @model_validator(mode="after")
    def _alpha_has_a_use(self) -> MarginLoss:
        if self.f_alpha != 0.5 and self.f_divergence != "alpha_divergence":
            raise ValueError(
                f"f_alpha is {self.f_alpha:g}, and f_divergence {self.f_divergence} has none: set "
                "f_divergence: alpha_divergence, or leave f_alpha out"
            )
        return self

    def scores(self, ratios: Float[Array, "P 2"]) -> Float[Array, "P 2"]:
        if self.f_divergence == "js_divergence":
            return np.log(2) + jax.nn.log_sigmoid(ratios)
        power = {"reverse_kl": 1.0, "forward_kl": 0.0}.get(self.f_divergence, self.f_alpha) - 1
        if abs(power) < 1e-6:
            return ratios
        return (jnp.exp(jnp.minimum(power * ratios, _EXP_LIMIT)) - 1) / power


def smoothed_logistic(x: Float[Array, " P"], smoothing: float) -> Float[Array, " P"]:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x)."""
    return -(1 - smoothing) * jax.nn.log_sigmoid(x) - smoothing * jax.nn.log_sigmoid(-x)
