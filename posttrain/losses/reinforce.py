"""The policy gradient itself."""

from __future__ import annotations

from jaxtyping import Array, Float

from posttrain.losses.policy_loss import PolicyLoss
from posttrain.losses.policy_tokens import PolicyTokens


class Reinforce(PolicyLoss):
    """The policy gradient, with no ratio and no clip.

        -A log p

    Source: Williams 1992; for language models Ahmadian et al. 2024 (RLOO, arXiv:2402.14740), whose
    gradient is that of whole answers: the sum over an answer's tokens, `aggregate: constant` with
    `length: 1` (or any length, with the learning rate that fits).
    When: one update on each batch. A second one on the same batch is off policy, and not corrected.
    """

    def per_token(self, tokens: PolicyTokens) -> Float[Array, "B T"]:
        return -tokens.advantages * tokens.logps
