"""What policy-gradient losses share: settings, and what they report.

A loss of the family is a class with a `per_token`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from jaxtyping import Array, Float

from posttrain.config import Config, semantic
from posttrain.losses.correction import Correction
from posttrain.losses.nll import source_of_tokens
from posttrain.losses.policy_tokens import Aggregate, PolicyTokens, aggregated, policy_tokens
from posttrain.types import Batch, Mean, Terms, TokenOutputs


class PolicyLoss(Config):
    """A loss of `posttrain rl`: what is minimised is -(advantage times something of the policy),
    less an entropy bonus; a mean over what `aggregate` says, of the whole optimiser step."""

    needs: ClassVar[frozenset[str]] = frozenset({"logps", "entropy"})

    aggregate: Aggregate = semantic(
        "token",
        help="token = mean over all tokens, sequence = over answers' means, constant = answers' "
        "sums over `length`",
    )
    length: int | None = semantic(
        None, gt=0, help="of aggregate: constant; none = sampling.max_new_tokens"
    )
    entropy_coef: float = semantic(
        0.0, ge=0, help="weight of the entropy bonus, averaged as the loss is"
    )
    correction: Correction = semantic(
        Correction(), help="for what the sampler's distribution was not the policy's"
    )

    @abstractmethod
    def per_token(self, tokens: PolicyTokens) -> Float[Array, "B T"]:
        """The loss of each token."""

    def noted(self, tokens: PolicyTokens) -> dict[str, Any]:
        """What else is reported, by name."""
        return {}

    def __call__(self, outputs: TokenOutputs, batch: Batch) -> Terms:
        """A term per token, [B, T].

        Metrics, over trained tokens: entropy; policy/approxkl_avg (TRL's PPO), half the mean square
        of log p - log p_old; loss/policy_avg (likewise), the loss without entropy bonus and KL;
        what `correction` and the loss note.
        """
        tokens = policy_tokens(outputs, batch)
        weights, count = aggregated(tokens, self.aggregate, self.length)
        factors, metrics = self.correction.factors(tokens)
        values = factors * self.per_token(tokens)
        metrics |= {
            "entropy": tokens.mean(outputs.entropy),
            "policy/approxkl_avg": tokens.mean(0.5 * (tokens.logps - tokens.old_logps) ** 2),
            "loss/policy_avg": Mean((values * weights).sum(), count.sum()),
            **self.noted(tokens),
        }
        if self.entropy_coef:
            values -= self.entropy_coef * outputs.entropy
        return Terms(values, weights, source_of_tokens(batch), metrics, count)
