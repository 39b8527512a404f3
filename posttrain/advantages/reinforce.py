"""Advantages of plain REINFORCE: the reward against the round's mean."""

from __future__ import annotations

from typing import Literal

import numpy as np

from posttrain.advantages.base import EPS, Advantage, Advantages, Signal, of_answers, std_of
from posttrain.config import semantic


class Reinforce(Advantage):
    """The reward less the mean reward of all answers of the round, whatever their prompts.

        A_i = r_i - mean(r)

    Source: Williams 1992 (REINFORCE), whose baseline this is.
    When: one answer to each prompt and no critic; or to see what a better baseline is worth.
    """

    baseline: Literal["batch", "none"] = semantic(
        "batch", help="what is taken off the reward; none: nothing is"
    )
    normalise: bool = semantic(False, help="divide by the standard deviation of the rewards")

    def __call__(self, signal: Signal) -> Advantages:
        totals = signal.totals()
        there = ~np.isnan(totals)
        advantages = totals
        if self.baseline == "batch" and there.any():
            advantages = totals - totals[there].mean()
        if self.normalise:
            advantages = advantages / (std_of(totals) + EPS)
        return of_answers(signal, advantages)
