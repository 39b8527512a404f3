"""What a round's answers say, under TRL's names: rewards, lengths, groups, tools.

All figures are of all answers that were sampled, those that are not trained on included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.advantages.base import without_signal
from posttrain.sampling.conversation import tool_metrics
from posttrain.types import Rollout


def round_metrics(rollouts: Sequence[Rollout], right: str) -> dict[str, float]:
    """right: the part of the rewards that is 1 (or more) where an answer is right; "": none is, and
    accuracy is left out."""
    rewards = np.array([rollout.reward for rollout in rollouts], np.float64)
    groups = np.array([rollout.group for rollout in rollouts])
    scored = rewards[~np.isnan(rewards)]
    found = {"reward": _mean(scored), "reward_std": _mean(_spreads(rewards, groups))}
    flat = without_signal(rewards, groups)
    first = np.unique(groups, return_index=True)[1]
    found["frac_reward_zero_std"] = _mean(flat[first])
    found["frac_unscored"] = float(np.isnan(rewards).mean())
    names = dict.fromkeys(name for rollout in rollouts for name in rollout.rewards)
    for name in names:
        parts = np.array([_value(rollout, name) for rollout in rollouts])
        parts = parts[~np.isnan(parts)]
        if len(parts) < len(rollouts):
            found[f"rewards/{name}/applied"] = len(parts) / len(rollouts)
        if len(parts):
            found[f"rewards/{name}/mean"] = float(parts.mean())
            found[f"rewards/{name}/std"] = float(parts.std(ddof=1)) if len(parts) > 1 else 0.0
    found |= _lengths(rollouts, right)
    if any(rollout.prompt.tools for rollout in rollouts):  # calls that come to an end are seen, too
        found |= {name: float(mean.value) for name, mean in tool_metrics(rollouts).items()}
    return {name: value for name, value in found.items() if not np.isnan(value)}


def right_or_wrong(rollouts: Sequence[Rollout], right: str) -> np.ndarray:
    """float64 [N]: 1 where the answer is right, 0 where it is wrong, NaN where nobody knows."""
    values = np.array([_value(rollout, right) for rollout in rollouts])
    return np.where(np.isnan(values), np.nan, values >= 1)


def _lengths(rollouts: Sequence[Rollout], right: str) -> dict[str, float]:
    """In sampled tokens."""
    lengths = np.array([rollout.length for rollout in rollouts], np.float64)
    cut = np.array([rollout.finish == "length" for rollout in rollouts])
    correct = right_or_wrong(rollouts, right)
    ended = lengths[~cut]
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(cut.mean()),
        "completions/mean_terminated_length": _mean(ended),
        "completions/min_terminated_length": float(ended.min()) if len(ended) else np.nan,
        "completions/max_terminated_length": float(ended.max()) if len(ended) else np.nan,
        "completions/mean_right_length": _mean(lengths[correct == 1]),
        "completions/mean_wrong_length": _mean(lengths[correct == 0]),
        "accuracy": _mean(correct[~np.isnan(correct)]),
    }


def _spreads(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The standard deviation of each group's rewards, with Bessel's correction."""
    parts = [rewards[(groups == group) & ~np.isnan(rewards)] for group in np.unique(groups)]
    return np.array([part.std(ddof=1) for part in parts if len(part) > 1])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else np.nan


def _value(rollout: Rollout, name: str) -> float:
    value = rollout.rewards.get(name)
    return np.nan if value is None else float(value)
