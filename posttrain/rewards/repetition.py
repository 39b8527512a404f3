"""A penalty on saying the same again."""

from __future__ import annotations

from typing import Literal

import numpy as np

from posttrain.config import semantic
from posttrain.rewards.base import Reward
from posttrain.types import Rollout


class Repetition(Reward):
    """-(1 - distinct n-grams / n-grams): 0 where none comes twice, near -1 where all are one.

    Source: Yeo et al. 2025 (arXiv:2502.03373), appendix C.2, per answer instead of per token.
    """

    n: int = semantic(3, gt=0, help="length of the runs that are counted")
    unit: Literal["words", "tokens"] = semantic("words", help="what runs are made of")

    def __call__(self, rollout: Rollout) -> float | None:
        if self.unit == "words":
            items = rollout.text.lower().split()
        else:
            items = rollout.tokens[np.flatnonzero(rollout.loss_weights)].tolist()
        grams = [tuple(items[k : k + self.n]) for k in range(len(items) - self.n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0
