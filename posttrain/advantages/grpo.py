"""Advantages against the other answers to the same prompt, and over how far these are apart."""

from __future__ import annotations

from typing import Literal

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


class GRPO(Advantage):
    """The reward less the mean of its group, over the standard deviation of the group.

        A_i = (r_i - mean(r)) / (std(r) + 1e-4)

    std with Bessel's correction, as TRL has it. A group of equal rewards has advantages of exactly
    0, however its mean is rounded.
    Source: Shao et al. 2024 (DeepSeekMath, arXiv:2402.03300), section 4.1.2; without the division
    (scale: none) Liu et al. 2025 (Dr. GRPO, arXiv:2503.20783), section 3: the division weighs the
    prompts most that are nearly always or hardly ever solved. scale: batch, one standard deviation
    of all rewards of the round (Liu et al. 2025, Lite PPO, arXiv:2508.08221).
    When: several answers to each prompt and no critic: first.
    """

    scale: Literal["group", "batch", "none"] = semantic(
        "group", help="whose standard deviation advantages are divided by; none: they are not"
    )

    @property
    def needs_group(self) -> bool:
        return True

    def __call__(self, signal: Signal) -> Advantages:
        totals = signal.totals()
        stats = group_stats(totals, signal.groups)
        advantages = stats.apart
        if self.scale != "none":
            advantages = advantages / (
                (stats.std if self.scale == "group" else std_of(totals)) + EPS
            )
        return of_answers(signal, advantages)
