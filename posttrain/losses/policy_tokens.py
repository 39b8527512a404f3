"""What a policy-gradient loss sees of the sampled tokens, and what it is averaged over.

Shape suffixes: B rows, T positions, S segments of a row; an answer is a segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from posttrain.losses.pairs import positions_in_answer, segment_sums, to_tokens
from posttrain.types import Batch, Mean, TokenOutputs

RatioLevel = Literal["token", "sequence", "product"]
Aggregate = Literal["token", "sequence", "constant"]
LIMIT = 20.0
"""Log-ratios are cut off here, so that no exp overflows: past it there is no gradient."""


@dataclass(frozen=True)
class PolicyTokens:
    """The sampled tokens of one micro-batch, float32 [B, T], 0 where no token is trained.

    logps: by the policy, with a gradient; old_logps: by the policy before the first update on the
    batch. trained: 1 where a token is. lengths: how many of them its answer has, at least 1. first:
    1 on the first trained token of each answer, so that its sum counts answers.
    """

    logps: Any
    old_logps: Any
    advantages: Any
    trained: Any
    lengths: Any
    first: Any
    batch: Batch

    def of_answer(self, values: Float[Array, "B T"]) -> Float[Array, "B T"]:
        """At each token, the sum over its answer's trained tokens."""
        return to_tokens(segment_sums(values * self.trained, self.batch), self.batch)

    def log_ratios(self, level: RatioLevel) -> Float[Array, "B T"]:
        """log of what the policy has become by the policy that it was, of each token; of its whole
        answer, per token (sequence: GSPO's, the geometric mean) or not (product)."""
        each = (self.logps - self.old_logps).clip(-LIMIT, LIMIT)
        if level == "token":
            return each
        whole = self.of_answer(each)
        return whole / self.lengths if level == "sequence" else whole.clip(-LIMIT, LIMIT)

    def mean(self, values: Float[Array, "B T"], level: RatioLevel = "token") -> Mean:
        """Over trained tokens; of what is an answer's, over answers."""
        if level == "token":
            return Mean((values * self.trained).sum(), self.trained.sum())
        return Mean((values * self.trained / self.lengths).sum(), self.first.sum())


def policy_tokens(outputs: TokenOutputs, batch: Batch) -> PolicyTokens:
    """Where the batch has no old_logps, one update being made of it, the policy's own are they."""
    trained = (batch.loss_weights > 0).astype(jnp.float32)
    counts_BS = segment_sums(trained, batch)
    first = (positions_in_answer(trained, counts_BS, batch) == 1) * trained
    old = jax.lax.stop_gradient(outputs.logps) if batch.old_logps is None else batch.old_logps
    return PolicyTokens(
        logps=outputs.logps * trained,
        old_logps=old * trained,
        advantages=batch.advantages * trained,
        trained=trained,
        lengths=jnp.maximum(to_tokens(counts_BS, batch), 1),
        first=first,
        batch=batch,
    )


def aggregated(
    tokens: PolicyTokens, aggregate: Aggregate, length: int | None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(weights, count) of Terms: what the terms of tokens are averaged over.

    token: over all trained tokens of the step (DAPO, arXiv:2503.14476, eq. 8). sequence: over
    answers, of each one's mean (GRPO, arXiv:2402.03300, eq. 3), so that a token of a long answer
    counts less. constant: each answer's sum over `length`, whatever its own length (Dr. GRPO,
    arXiv:2503.20783). An answer of which nothing is trained is no answer here.
    """
    if aggregate == "token":
        return tokens.trained, tokens.trained
    if aggregate == "sequence":
        return tokens.trained / tokens.lengths, tokens.first
    if length is None:
        raise ValueError("loss.aggregate is constant: loss.length must say over which length")
    return tokens.trained, tokens.first * length
