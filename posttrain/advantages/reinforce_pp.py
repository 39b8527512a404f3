"""Advantages of REINFORCE++: returns of tokens, normalised over all tokens of the round."""

from __future__ import annotations

import numpy as np

from posttrain.advantages.base import (
    Advantage,
    Advantages,
    Signal,
    group_stats,
    spread_out,
    whitened,
)
from posttrain.config import semantic


class ReinforcePP(Advantage):
    """What is still to come from each token on, normalised over all sampled tokens of the round.

        R_t = sum_{s >= t} gamma^(s - t) r_s,  A_t = (R_t - mean(R)) / std(R)

    r_s is the penalty of token s (the KL in the reward) and, of the last one, the answer's reward.
    s and t count sampled tokens: what a tool returned stands between them and discounts nothing.
    Source: Hu 2025 (REINFORCE++, arXiv:2501.03262); with `baseline` its variant for
    several answers to a prompt, whose rewards lose the mean of their group before (and whose KL,
    k2, stands in the loss).
    When: one answer to each prompt, no critic; with `baseline` several, where dividing by each
    group's own deviation is not wanted.
    """

    gamma: float = semantic(1.0, gt=0, le=1, help="discount of a token")
    baseline: bool = semantic(False, help="take the mean of its group off each reward first")

    @property
    def needs_group(self) -> bool:
        return self.baseline

    def __call__(self, signal: Signal) -> Advantages:
        rewards = np.asarray(signal.rewards, np.float64)
        if self.baseline:
            rewards = group_stats(rewards, signal.groups).apart
        returns = [discounted(r, self.gamma) for r in signal.token_rewards(rewards)]
        whole = whitened(returns, [np.ones(len(r)) for r in returns])
        return Advantages(spread_out(whole, signal.weights))


def discounted(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """R_t = r_t + gamma R_{t+1}, float64."""
    if gamma == 1:
        return np.cumsum(rewards[::-1])[::-1]
    returns, ahead = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        returns[t] = ahead = rewards[t] + gamma * ahead
    return returns
