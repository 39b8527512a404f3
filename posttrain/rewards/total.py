"""The sum: parts' values, shaped and weighted, become one reward per answer.

Which values there are is decided by the rewards (scorer.py asks them); what they are worth here, by
numpy alone, so that the same values may be weighed again over another batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np

from posttrain.config import Config, ConfigError, did_you_mean, runtime, semantic
from posttrain.config_yaml import Problem
from posttrain.rewards import REWARDS
from posttrain.rewards.base import Cosine, Reward, RewardVariant, Scope, length_of
from posttrain.types import Rollout

EPS = 1e-4
"""Added to a standard deviation that is divided by, as TRL does."""

RewardParts = dict[str, Annotated[Reward, RewardVariant(REWARDS, None)]]
"""The section `rewards` of a job: {name: {type: ..., weight: ..., ...}}."""


class Shaping(Config):
    """How parts become one reward: the section `shaping`.

    parts group, total none: each part is normalised, then weighted and added up; with total batch
    as well this is GDPO (Liu et al. 2026, arXiv:2601.05242). parts none, total group: added up,
    then normalised.
    """

    parts: Scope = semantic("none", help="z-score of each part over its group or the batch")
    total: Scope = semantic("none", help="z-score of the sum over its group or the batch")
    clip: tuple[float, float] | None = semantic(None, help="least and greatest reward, at last")
    threads: int = runtime(16, gt=0, help="answers that are scored at once")
    timeout: float = runtime(
        600.0, gt=0, help="seconds without a value after which a reward is taken to hang"
    )


def check(parts: Mapping[str, Reward]) -> None:
    """ConfigError with everything that is wrong between the parts."""
    wrong = []
    if not parts:
        message = "there is none: name at least one, as {correct: {type: exact}}"
        wrong.append(Problem("rewards", "", message))
    elif not any(part.weight for part in parts.values()):
        wrong.append(Problem("rewards", "", "every weight is 0: there is nothing to learn"))
    for name, part in parts.items():
        if part.gate is None:
            continue
        path, other = f"rewards.{name}.gate.part", part.gate.part
        if other == name:
            wrong.append(Problem(path, "", "is the part itself: name another one"))
        elif other not in parts:
            hint = did_you_mean(other, list(parts)) or f"; there are {', '.join(parts)}"
            wrong.append(Problem(path, "", f"no part {other!r}{hint}"))
    if wrong:
        raise ConfigError(wrong)


def combine(
    parts: Mapping[str, Reward], shaping: Shaping, rollouts: Sequence[Rollout]
) -> list[Rollout]:
    """The rollouts, each with its `reward`, of the values in their `rewards`.

    A part that is None is left out of its answer's sum, and of means and deviations. Where every
    part that has a weight is None the reward is NaN: nothing is known of the answer.
    """
    groups = np.array([rollout.group for rollout in rollouts], np.int64)
    total, known = np.zeros(len(rollouts)), np.zeros(len(rollouts), bool)
    for name, part in parts.items():
        values = _shaped(name, part, shaping, rollouts, groups)
        there = ~np.isnan(values)
        total[there] += part.weight * values[there]
        if part.weight:  # what is logged alone says nothing of what the answer is worth
            known |= there
    total[~known] = np.nan
    total = zscore(total, groups, shaping.total)
    if shaping.clip is not None:
        total = np.clip(total, *shaping.clip)
    return [replace(r, reward=float(x)) for r, x in zip(rollouts, total, strict=True)]


def _shaped(
    name: str, part: Reward, shaping: Shaping, rollouts: Sequence[Rollout], groups: np.ndarray
) -> np.ndarray:
    """[N]; NaN where the part does not apply."""
    found = (_one(name, part, rollout) for rollout in rollouts)
    values = np.array([math.nan if x is None else x for x in found], np.float64)
    values = zscore(values, groups, shaping.parts if part.zscore is None else part.zscore)
    return values if part.clip is None else np.clip(values, *part.clip)


def _one(name: str, part: Reward, rollout: Rollout) -> float | None:
    value = rollout.rewards.get(name)
    if value is None:
        return None
    if part.cosine is not None:
        value = cosine_scaled(part.cosine, value, length_of(rollout, "tokens"))
    value *= part.scale
    if part.gate is not None:
        gate = rollout.rewards.get(part.gate.part)  # one that does not apply stands open
        if gate is not None and gate < part.gate.at_least:
            return part.gate.otherwise
    return value


def cosine_scaled(cfg: Cosine, value: float, length: int) -> float:
    """What an answer of this many tokens is worth: see Cosine."""
    wave = (1 + math.cos(math.pi * min(length / cfg.max_length, 1.0))) / 2
    if value >= cfg.at_least:
        low, high = cfg.correct
    else:
        high, low = cfg.wrong
    return low + (high - low) * wave


def deviation(values: np.ndarray) -> float:
    """The standard deviation of what is not NaN, over n - 1; 0 of fewer than two values."""
    values = values[~np.isnan(values)]
    if len(values) < 2 or values.min() == values.max():
        return 0.0
    return float(values.std(ddof=1))


def zscore(values: np.ndarray, groups: np.ndarray, scope: Scope) -> np.ndarray:
    """[N] (value - mean) / (deviation + EPS), of each group or of all; NaN stays NaN.

    Where there is no spread, 0.
    """
    if scope == "none":
        return values
    out = np.full(len(values), np.nan)
    labels = groups if scope == "group" else np.zeros(len(values), np.int64)
    for label in np.unique(labels):
        at = (labels == label) & ~np.isnan(values)
        if at.any():
            spread = deviation(values[at])
            out[at] = (values[at] - values[at].mean()) / (spread + EPS) if spread else 0.0
    return out
