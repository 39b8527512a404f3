"""Penalties on length."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from posttrain.config import semantic
from posttrain.rewards.base import Reward, Unit, length_of
from posttrain.types import Rollout


class Length(Reward):
    """-|length - target| / per: the farther from the target, the worse.

    With target 0 a plain price of length. Source: L1 (Aggarwal and Welleck 2025, arXiv:2503.04697),
    eq. 1, has this term.
    """

    per: float = semantic(gt=0, help="how much longer costs 1")
    target: int = semantic(0, ge=0, help="the length that costs nothing")
    longer_only: bool = semantic(False, help="less than the target costs nothing either")
    unit: Unit = semantic("tokens", help="what length is counted in")

    def __call__(self, rollout: Rollout) -> float | None:
        over = length_of(rollout, self.unit) - self.target
        return -max(over, 0) / self.per if self.longer_only else -abs(over) / self.per


class Overlong(Reward):
    """Soft over-long punishment: 0 up to max_length - cache tokens, from there down to -1 at
    max_length, -1 beyond.

    Source: DAPO (Yu et al. 2025, arXiv:2503.14476), eq. 13.
    """

    max_length: int = semantic(gt=0, help="tokens from which on an answer costs 1")
    cache: int = semantic(gt=0, help="tokens before max_length where the punishment begins")

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if self.cache > self.max_length:
            raise ValueError(f"cache ({self.cache}) is more than max_length ({self.max_length})")
        return self

    def __call__(self, rollout: Rollout) -> float | None:
        over = length_of(rollout, "tokens") - (self.max_length - self.cache)
        return -min(max(over, 0) / self.cache, 1.0)
