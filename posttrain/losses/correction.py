"""Importance correction: what was sampled was not drawn from the policy that is differentiated.

The sampler computes in another order, perhaps in another precision, and may be some updates behind:
its q is not the policy p_old that the batch is measured against. E_q[(p_old / q) f] = E_p_old[f].
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import model_validator

from posttrain.config import Config, semantic
from posttrain.losses.policy_tokens import LIMIT, PolicyTokens
from posttrain.types import Extremes


class Correction(Config):
    """Each token's term times w = p_old / q, cut off, without a gradient.

    truncate: w is moved into [low, high] (TIS: Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"). mask: 0 where it lies outside (MIS; IcePop, Ling
    team 2025, arXiv:2510.18855). level: sequence takes the product over the answer's tokens, whose
    expectation is right and whose variance grows with the length. Where the sampler drew with top-p
    or top-k, q is the filtered distribution and w < 1: what was cut off is never sampled, and no
    weight brings it back.
    """

    type: Literal["none", "truncate", "mask"] = semantic("truncate", help="what is done")
    level: Literal["token", "sequence"] = semantic("token", help="of which w is made")
    low: float | None = semantic(None, ge=0, help="least w; none = no limit")
    high: float | None = semantic(2.0, gt=0, help="greatest w; none = no limit")

    @model_validator(mode="after")
    def _some_room(self) -> Correction:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low is {self.low} and high {self.high}: low must be below high")
        return self

    def factors(self, tokens: PolicyTokens) -> tuple[Float[Array, "B T"] | float, dict[str, Any]]:
        """(w of each token, metrics); 1 where the batch has no sampled_logps.

        Metrics, under TRL's names: sampling/sampling_logp_difference/{mean,max} of
        |log p_old - log q| over trained tokens, whatever `type` is;
        sampling/importance_sampling_ratio/{min,mean,max} of w as used, over tokens or answers.
        """
        if tokens.batch.sampled_logps is None:
            return 1.0, {}
        trained = tokens.trained
        apart = jax.lax.stop_gradient(tokens.old_logps - tokens.batch.sampled_logps) * trained
        name, found = "sampling/sampling_logp_difference", jnp.abs(apart)
        metrics: dict[str, Any] = {
            f"{name}/mean": tokens.mean(found),
            name: _extremes(found, trained),
        }
        if self.type == "none":
            return 1.0, metrics
        whole = self.level == "sequence"
        w = jnp.exp((tokens.of_answer(apart) if whole else apart).clip(-LIMIT, LIMIT))
        if self.type == "truncate":
            w = w.clip(self.low, self.high)
        else:
            low = 0.0 if self.low is None else self.low
            high = jnp.inf if self.high is None else self.high
            w = jnp.where((w >= low) & (w <= high), w, 0.0)
        name = "sampling/importance_sampling_ratio"
        metrics |= {
            f"{name}/mean": tokens.mean(w, "sequence" if whole else "token"),
            name: _extremes(w, trained),
        }
        return w, metrics


def _extremes(values: Float[Array, "B T"], trained: Float[Array, "B T"]) -> Extremes:
    there = trained > 0
    least, greatest = (jnp.where(there, values, none) for none in (jnp.inf, -jnp.inf))
    return Extremes(least.min(), greatest.max())
