"""The clipped surrogate of PPO and of what came after it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from pydantic import model_validator

from posttrain.config import semantic
from posttrain.losses.policy_loss import PolicyLoss
from posttrain.losses.policy_tokens import PolicyTokens, RatioLevel


class Clip(PolicyLoss):
    """Clipped importance ratio: going further from the old policy than the clip gains nothing.

        -min(r A, clip(r, 1 - low, 1 + high) A),   r = p / p_old
        and, of a negative A and with `dual`, at most -dual A

    Source: Schulman et al. 2017 (PPO, arXiv:1707.06347), eq. 7; GRPO (arXiv:2402.03300), eq. 3,
    takes it with the answer's advantage; high above low is DAPO's clip-higher (Yu et al. 2025,
    arXiv:2503.14476, section 3.1), dual Ye et al. 2020 (arXiv:1912.09729; TRL: delta); ratio:
    sequence is GSPO's, with `aggregate: sequence` (Zheng et al. 2025, arXiv:2507.18071, eqs. 5-7).
    When: several updates on each batch; with one alone the ratio is 1 and nothing is clipped.
    """

    ratio: RatioLevel = semantic(
        "token",
        help="whose r: token = each one's, sequence = the geometric mean over the answer, product "
        "= the whole answer's",
    )
    low: float = semantic(0.2, ge=0, le=1, help="r is clipped below at 1 - low")
    high: float = semantic(0.2, ge=0, help="and above at 1 + high")
    dual: float | None = semantic(
        None,
        help="greatest r of tokens with a negative advantage, above 1 + high; none = no limit",
    )

    @model_validator(mode="after")
    def _past_the_clip(self) -> Clip:
        if self.dual is not None and self.dual <= 1 + self.high:
            raise ValueError(
                f"dual is {self.dual} and 1 + high {1 + self.high}: below that it would hold back "
                "what the clip lets through"
            )
        return self

    def per_token(self, tokens: PolicyTokens) -> Float[Array, "B T"]:
        r, advantages = jnp.exp(tokens.log_ratios(self.ratio)), tokens.advantages
        clipped = r.clip(1 - self.low, 1 + self.high)
        if self.dual is not None:
            r = jnp.minimum(r, self.dual)
        return -jnp.minimum(r * advantages, clipped * advantages)

    def noted(self, tokens: PolicyTokens) -> dict[str, Any]:
        """clip_ratio/{low_mean,high_mean,region_mean}: share of the tokens (of a ratio of answers:
        of the answers) whose ratio is past the clip on the side of their advantage's sign, so that
        they have no gradient; policy/clipfrac_avg, PPO's name of the last."""
        r, advantages = jnp.exp(tokens.log_ratios(self.ratio)), tokens.advantages
        low = (r < 1 - self.low) & (advantages < 0)
        high = (r > 1 + self.high) & (advantages > 0)

        def share(which: Bool[Array, "B T"]) -> Any:
            return tokens.mean(which.astype(jnp.float32), self.ratio)

        return {
            "clip_ratio/low_mean": share(low),
            "clip_ratio/high_mean": share(high),
            "clip_ratio/region_mean": share(low | high),
            "policy/clipfrac_avg": share(low | high),
        }
