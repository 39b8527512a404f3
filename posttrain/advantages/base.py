"""What advantages are made of and what comes out, and what several of them share.

Shapes: N answers of a round, n tokens of an answer (each answer has its own n).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from posttrain.config import Config

EPS = 1e-4
"""Added to the standard deviation of rewards that they are divided by (TRL's)."""
FLAT = 1e-8
"""Rewards of a group that are no further apart than this are equal."""

Tokens = Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Signal:
    """What is known of the N answers of a round.

    rewards [N]: of each answer, NaN where nothing could score it (it gets no advantage, and no part
    in anybody's baseline). groups [N]: answers to one prompt have one number. Of each answer, per
    token [n]: weights, 1 where the token was sampled and is trained, 0 where it is the prompt's or
    a tool's; penalties, rewards of sampled tokens (a KL to the reference in the reward, negative
    where the token costs), 0 elsewhere; values, a critic's of what comes from the token on. An
    answer that is not trained on has weights of 0 and penalties all the same: others are set
    against its reward, and that is to be of one kind with theirs.
    """

    rewards: Float[np.ndarray, " N"]
    groups: Int[np.ndarray, " N"]
    weights: Sequence[np.ndarray]
    penalties: Sequence[np.ndarray] | None = None
    values: Sequence[np.ndarray] | None = None

    def totals(self) -> Float[np.ndarray, " N"]:
        """float64: of each answer, its reward and the penalties of its tokens."""
        rewards = np.asarray(self.rewards, np.float64)
        if self.penalties is None:
            return rewards
        return rewards + [np.asarray(p, np.float64).sum() for p in self.penalties]

    def token_rewards(self, rewards: Float[np.ndarray, " N"]) -> list[np.ndarray]:
        """float64, of each answer's trained tokens alone, in order: the penalties, and on the last
        one the answer's reward. An answer without a reward, or without a token: no tokens."""
        made = []
        for i, weights in enumerate(self.weights):
            at = np.flatnonzero(weights > 0)
            given = np.zeros(len(at)) if self.penalties is None else self.penalties[i][at]
            given = np.array(given, np.float64)
            if np.isnan(rewards[i]):
                given = given[:0]
            if len(given):
                given[-1] += rewards[i]
            made.append(given)
        return made


@dataclass(frozen=True)
class Advantages:
    """Of each answer, per token, float32 [n], 0 where the token was not sampled.

    returns: what a critic is to learn, of advantages that are made by one.
    """

    advantages: list[np.ndarray]
    returns: list[np.ndarray] | None = None


class Advantage(Config):
    """One of ADVANTAGES."""

    needs_values: ClassVar[bool] = False

    @property
    def needs_group(self) -> bool:
        """Whether an answer is set against others to its prompt: of one alone it is always 0."""
        return False

    @abstractmethod
    def __call__(self, signal: Signal) -> Advantages:
        """Of all answers of a round."""


@dataclass(frozen=True)
class GroupStats:
    """Of each answer [N], of its group's answers that have a reward: how many, sum, mean, standard
    deviation (Bessel's correction; 0 of fewer than two), greatest less least; and the answer's own
    reward less the mean: exactly 0 where those of its group are equal, however the mean is rounded,
    NaN where it has none."""

    count: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    spread: np.ndarray
    apart: np.ndarray


def group_stats(rewards: Float[np.ndarray, " N"], groups: Int[np.ndarray, " N"]) -> GroupStats:
    """Of each answer's group; NaN is no reward. The mean of a group without any is NaN."""
    _, of = np.unique(groups, return_inverse=True)
    there, size = ~np.isnan(rewards), int(of.max(initial=-1)) + 1
    known = np.where(there, rewards, 0.0)
    count = np.bincount(of, there, size)
    mean = np.divide(
        np.bincount(of, known, size), count, out=np.full(size, np.nan), where=count > 0
    )
    squares = np.bincount(of, np.where(there, (rewards - mean[of]) ** 2, 0.0), size)
    std = np.sqrt(squares / np.maximum(count - 1, 1))
    least, greatest = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(least, of[there], rewards[there])
    np.maximum.at(greatest, of[there], rewards[there])
    spread = np.maximum(greatest - least, 0.0)
    apart = np.where(spread[of] > FLAT, rewards - mean[of], np.where(there, 0.0, np.nan))
    return GroupStats(count[of], mean[of], std[of], spread[of], apart)


def without_signal(
    rewards: Float[np.ndarray, " N"], groups: Int[np.ndarray, " N"]
) -> Bool[np.ndarray, " N"]:
    """Of each answer: whether its group tells nothing, its rewards being equal or but one."""
    return group_stats(np.asarray(rewards, np.float64), groups).spread <= FLAT


def std_of(values: Float[np.ndarray, " N"]) -> float:
    """Standard deviation of those that are no NaN, Bessel's correction; 0 of fewer than two."""
    there = values[~np.isnan(values)]
    return float(there.std(ddof=1)) if len(there) > 1 else 0.0


def masked_mean(values: np.ndarray, mask: np.ndarray) -> float:
    """Mean of the values where the mask is not 0."""
    return float(values[mask > 0].mean())


def masked_var(values: np.ndarray, mask: np.ndarray) -> float:
    """Variance of the values where the mask is not 0, with Bessel's correction."""
    return float(values[mask > 0].var(ddof=1))


def whitened(values: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The values less their mean and over their standard deviation, both of all values of the round
    that a mask names; 0 elsewhere. Fewer than two values stay as they are: they have no spread."""
    flat = np.concatenate([np.asarray(v, np.float64) for v in values]) if values else np.zeros(0)
    mask = np.concatenate(list(masks)) > 0 if masks else np.zeros(0, bool)
    if mask.sum() > 1:
        flat = (flat - masked_mean(flat, mask)) / np.sqrt(masked_var(flat, mask) + 1e-8)
    flat = np.where(mask, flat, 0.0)
    return np.split(flat, np.cumsum([len(v) for v in values])[:-1]) if values else []


def spread_out(sampled: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """float32: values of each answer's sampled tokens, at their places; 0 elsewhere. Answers that
    `sampled` has nothing of: all 0."""
    made = []
    for values, weight in zip(sampled, weights, strict=True):
        placed = np.zeros(len(weight), np.float32)
        if len(values):
            placed[np.flatnonzero(weight > 0)] = values
        made.append(placed)
    return made


def of_answers(signal: Signal, advantages: Float[np.ndarray, " N"]) -> Advantages:
    """Advantages of whole answers: every sampled token has its answer's. NaN: 0."""
    known = np.nan_to_num(advantages, nan=0.0)
    tokens = [np.full(int((w > 0).sum()), a) for a, w in zip(known, signal.weights, strict=True)]
    return Advantages(spread_out(tokens, signal.weights))
