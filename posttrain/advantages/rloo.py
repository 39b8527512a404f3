"""Advantages against the mean of the OTHER answers to the same prompt."""

from __future__ import annotations

import numpy as np

from posttrain.advantages.base import (
    EPS,
    Advantage,
    Advantages,
    Signal,
    group_stats,
    of_answers,
    std_of,
)
from posttrain.config import semantic


class RLOO(Advantage):
    """The reward less the mean reward of the group's other answers (leave one out).

        A_i = r_i - sum_{j != i} r_j / (n - 1)

    which is n / (n - 1) times the distance from the group's mean. r is the reward with the KL
    penalties of its tokens, where the KL is in the reward.
    Source: Ahmadian et al. 2024 (RLOO, arXiv:2402.14740), section 2.2, after Kool et
    al. 2019.
    When: a baseline without a bias, at any number of answers; with `loss.type: reinforce` the
    plainest estimator that works.
    """

    normalise: bool = semantic(
        False, help="the round's advantages less their mean, over their standard deviation"
    )

    @property
    def needs_group(self) -> bool:
        return True

    def __call__(self, signal: Signal) -> Advantages:
        totals = signal.totals()
        stats = group_stats(totals, signal.groups)
        advantages = stats.apart * stats.count / np.maximum(stats.count - 1, 1)
        if self.normalise:
            mean = float(np.nanmean(advantages)) if (~np.isnan(advantages)).any() else 0.0
            advantages = (advantages - mean) / (std_of(advantages) + EPS)
        return of_answers(signal, advantages)
