"""The KL of the policy from a reference, estimated from sampled tokens, in the loss or the reward.

With d = log p(x) - log p_ref(x) of a sampled token x (Schulman 2020, "Approximating KL
divergence"):

    k1 = d    k2 = d^2 / 2    k3 = exp(-d) - 1 + d

k1 and k3 are right on average, k3 of less variance and never negative; k2 is near. Differentiated,
they are another matter, since x itself is drawn from p: the gradient of KL(p | p_ref) is the mean
of d grad log p. That is k2's; k1's is 0 on average, and k3's, (1 - exp(-d)) grad log p, is that of
the KL the other way round. So `unbiased` keeps an estimate's value and gives it k2's gradient (and
the weight p / p_old, where p has moved on since x was drawn). In the reward it is k1 that gives the
right gradient, of later tokens too (Tang and Munos 2025, arXiv:2506.09477).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from posttrain.config import Config, semantic
from posttrain.losses.policy_loss import PolicyLoss
from posttrain.losses.policy_tokens import LIMIT, PolicyTokens, policy_tokens
from posttrain.types import Batch, Terms, TokenOutputs

Estimator = Literal["k1", "k2", "k3"]


def estimate(estimator: Estimator, d: Any) -> Any:
    """Per token, of numpy's or JAX's arrays, in nats."""
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d**2 / 2
    return d.__array_namespace__().exp((-d).clip(-LIMIT, LIMIT)) - 1 + d


class KL(Config):
    """What holds the policy to the reference."""

    coef: float = semantic(0.0, ge=0, help="weight (beta); 0: nothing does, and no reference runs")
    place: Literal["loss", "reward"] = semantic(
        "loss", help="reward: each token is penalised, and the advantage spreads it"
    )
    estimator: Estimator = semantic("k3", help="k1, k2 or k3")
    unbiased: bool = semantic(
        True,
        help="in the loss: the gradient is the KL's own; false: the estimator's, as GRPO has it",
    )
    idle: bool = semantic(
        False, help="in the loss: pull also answers whose advantages are all 0, as of equal groups"
    )

    @property
    def in_loss(self) -> bool:
        return self.coef > 0 and self.place == "loss"

    @property
    def in_reward(self) -> bool:
        return self.coef > 0 and self.place == "reward"

    def penalties(
        self,
        logps: Float[np.ndarray, " n"],
        reference: Float[np.ndarray, " n"],
        weights: Float[np.ndarray, " n"],
    ) -> Float[np.ndarray, " n"]:
        """Of one answer, for Signal.penalties: -coef times the estimate of each sampled token (of
        weight above 0), 0 elsewhere. logps: by the policy that sampled it."""
        if not self.in_reward:
            return np.zeros(len(weights))
        d = np.where(weights > 0, np.asarray(logps, np.float64) - reference, 0.0)
        return -self.coef * estimate(self.estimator, d)

    def line(self) -> str:
        """For the first lines of a run: what is estimated where, and whose gradient it has."""
        if not self.coef:
            return "kl: none"
        said = f"kl: {self.coef:g} x {self.estimator} in the {self.place}, "
        if self.place == "reward":
            right = self.estimator == "k1"
        else:
            right = self.unbiased or self.estimator == "k2"
            if self.estimator == "k1" and not right:
                return said + "whose gradient is 0 on average: it holds nothing"
        return said + ("with the KL's own gradient" if right else "whose gradient is biased")

    def per_token(
        self, tokens: PolicyTokens, reference: Float[Array, "B T"]
    ) -> Float[Array, "B T"]:
        """In the loss: the estimate of each token, with the gradient that was chosen."""
        d = (tokens.logps - reference).clip(-LIMIT, LIMIT)
        value = estimate(self.estimator, d)
        if not self.unbiased:
            return value
        ratio, value, d = jax.lax.stop_gradient((jnp.exp(tokens.log_ratios("token")), value, d))
        return ratio * (value + d * (tokens.logps - jax.lax.stop_gradient(tokens.logps)))


@dataclass(frozen=True)
class Objective:
    """What `posttrain rl` minimises: a policy loss, and the KL where it stands in the loss.

    A loss as train/step.py takes it. The loss's terms must be tokens, [B, T].
    """

    loss: Any
    kl: KL

    @property
    def needs(self) -> frozenset[str]:
        return self.loss.needs | ({"reference_logps"} if self.kl.in_loss else set())

    def __call__(self, outputs: TokenOutputs, batch: Batch) -> Terms:
        """The loss's terms, and coef times the KL of each token.

        Metrics: the loss's; kl, the mean estimate over trained tokens, if the reference is known:
        in the loss of the policy as it is, in the reward of the policy that drew.
        """
        terms: Terms = self.loss(outputs, batch)
        if batch.reference_logps is None:
            return terms
        tokens = policy_tokens(outputs, batch)
        if self.kl.in_loss:
            found = self.kl.per_token(tokens, batch.reference_logps)
        else:
            found = estimate(self.kl.estimator, tokens.old_logps - batch.reference_logps)
        metrics = {**terms.metrics, "kl": tokens.mean(found)}
        if not self.kl.in_loss:
            return replace(terms, metrics=metrics)
        if not self.kl.idle:
            found = found * (tokens.of_answer(jnp.abs(tokens.advantages)) > 0)
        values = terms.values + self.kl.coef * found
        return replace(terms, values=values, metrics=metrics)


def objective(loss: Any, kl: KL, max_new_tokens: int) -> Objective:
    """Of a job's sections. max_new_tokens: the length of an aggregate that none was given for."""
    if isinstance(loss, PolicyLoss) and loss.length is None:
        loss = loss.model_copy(update={"length": max_new_tokens})
    return Objective(loss, kl)
