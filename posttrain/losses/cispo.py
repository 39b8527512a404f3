"""CISPO: what is clipped is a weight, so that every token keeps a gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import model_validator

from posttrain.config import semantic
from posttrain.losses.policy_loss import PolicyLoss
from posttrain.losses.policy_tokens import PolicyTokens, RatioLevel


class CISPO(PolicyLoss):
    """REINFORCE with a clipped importance weight.

        -sg(clip(r, low, high)) A log p,   r = p / p_old, sg: without a gradient

    Source: MiniMax 2025 (MiniMax-M1, arXiv:2506.13585), eqs. 4 and 5; they limit r above alone.
    low and high are r's own limits (the paper's 1 - epsilon_low and 1 + epsilon_high; TRL's
    epsilon_high is `high`), 5 as in ScaleRL (Khatri et al. 2025, arXiv:2510.13786).
    When: rare tokens on which an answer turns ("However", "Wait") are clipped away by `clip`.
    """

    ratio: RatioLevel = semantic("token", help="whose r, as for clip")
    low: float = semantic(0.0, ge=0, help="least weight")
    high: float = semantic(5.0, gt=0, help="greatest weight")

    @model_validator(mode="after")
    def _some_room(self) -> CISPO:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high {self.high}: low must be below high")
        return self

    def per_token(self, tokens: PolicyTokens) -> Float[Array, "B T"]:
        r = jnp.exp(tokens.log_ratios(self.ratio))
        weight = jax.lax.stop_gradient(r.clip(self.low, self.high))
        return -weight * tokens.advantages * tokens.logps

    def noted(self, tokens: PolicyTokens) -> dict[str, Any]:
        """cispo_clip_ratio (TRL): share of the tokens whose weight is cut off above and whose
        advantage is positive."""
        r = jnp.exp(tokens.log_ratios(self.ratio))
        cut = (r > self.high) & (tokens.advantages > 0)
        return {"cispo_clip_ratio": tokens.mean(cut.astype(jnp.float32), self.ratio)}
