"""Generalised advantage estimation: advantages by a critic."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from posttrain.advantages.base import Advantage, Advantages, Signal, spread_out, whitened
from posttrain.config import semantic


class GAE(Advantage):
    """Differences of what a critic foretold before and after each token, summed with a discount.

        d_t = r_t + gamma V_{t+1} - V_t,  A_t = sum_{s >= t} (gamma lambda)^(s - t) d_s
        returns R_t = A_t + V_t

    r_t is the penalty of token t and, of the last one, the answer's reward; past the last token V
    is 0. t counts sampled tokens alone: what the critic said at a token that a tool returned is
    passed over. The returns are of the advantages before they are whitened.
    Source: Schulman et al. 2016 (GAE, arXiv:1506.02438), eq. 16; whitened as Ziegler et al.
    2019 (arXiv:1909.08593) have it for language models.
    When: with a critic (PPO); lambda 1 where the critic is not to be relied on yet.
    """

    needs_values: ClassVar[bool] = True

    gamma: float = semantic(1.0, gt=0, le=1, help="discount of a token")
    lam: float = semantic(0.95, ge=0, le=1, help="lambda: 0 the critic alone, 1 the reward alone")
    whiten: bool = semantic(True, help="advantages less their mean, over their deviation")

    def __call__(self, signal: Signal) -> Advantages:
        if signal.values is None:
            raise ValueError("advantage type gae: there are no values: it needs a critic")
        rewards = signal.token_rewards(np.asarray(signal.rewards, np.float64))
        values = [
            np.asarray(v, np.float64)[w > 0]
            for v, w in zip(signal.values, signal.weights, strict=True)
        ]
        # an answer without a reward has no advantages, and teaches the critic what it says already
        advantages = [
            gae(r, v, self.gamma, self.lam) if len(r) else r
            for r, v in zip(rewards, values, strict=True)
        ]
        returns = [a + v if len(a) else v for a, v in zip(advantages, values, strict=True)]
        if self.whiten:
            advantages = whitened(advantages, [np.ones(len(a)) for a in advantages])
        return Advantages(
            spread_out(advantages, signal.weights), spread_out(returns, signal.weights)
        )


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Advantages [n] of n sampled tokens, float64."""
    after = np.append(values[1:], 0.0)
    deltas = rewards + gamma * after - values
    advantages, ahead = np.zeros(len(deltas)), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = ahead = deltas[t] + gamma * lam * ahead
    return advantages
