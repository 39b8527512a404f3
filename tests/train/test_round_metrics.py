"""What is reported of a round, worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from posttrain.train.online import is_flat
from posttrain.train.round_metrics import right_or_wrong, round_metrics
from posttrain.types import Finish, Prompt, Rollout


def rollout(
    group: int, reward: float, length: int, finish: Finish = "stop", **parts: float | None
) -> Rollout:
    weights = np.array([0, 0, *[1] * length], np.float32)
    nothing = np.zeros_like(weights)
    return Rollout(
        Prompt(f"p/{group}", ()), (), "", finish, weights.astype(np.int32), weights, nothing,
        nothing, group=group, rewards=parts, reward=reward,
    )  # fmt: skip


ROLLOUTS = [
    rollout(0, 1.0, 4, correct=1.0, form=0.0),
    rollout(0, 0.0, 8, "length", correct=0.0, form=None),
    rollout(1, 2.0, 2, correct=1.0, form=1.0),
    rollout(1, 2.0, 6, correct=1.0, form=1.0),
]


def test_rewards_by_part_and_by_group() -> None:
    found = round_metrics(ROLLOUTS, "correct")
    assert found["reward"] == pytest.approx(5 / 4)
    assert found["reward_std"] == pytest.approx((math.sqrt(0.5) + 0) / 2)
    assert found["frac_reward_zero_std"] == 0.5
    assert found["rewards/correct/mean"] == 0.75
    assert found["rewards/correct/std"] == pytest.approx(np.std([1, 0, 1, 1], ddof=1))
    assert found["rewards/form/mean"] == pytest.approx(2 / 3), "None has no part in it"
    assert found["frac_unscored"] == 0
    assert "tools/call_frequency" not in found


def test_tools_that_are_offered_and_not_called_are_reported() -> None:
    offered = Prompt("p", (), tools=({"function": {"name": "calculator"}},))
    rollouts = [dataclasses.replace(r, prompt=offered) for r in ROLLOUTS]
    found = round_metrics(rollouts, "correct")
    assert found["tools/call_frequency"] == 0
    assert "tools/failure_frequency" not in found, "of no calls"
    rollouts[0] = dataclasses.replace(rollouts[0], calls=2, failed_calls=1)
    found = round_metrics(rollouts, "correct")
    assert (found["tools/call_frequency"], found["tools/failure_frequency"]) == (0.5, 0.5)


def test_lengths_of_right_and_of_wrong_answers() -> None:
    found = round_metrics(ROLLOUTS, "correct")
    assert found["completions/mean_length"] == 5
    assert (found["completions/min_length"], found["completions/max_length"]) == (2, 8)
    assert found["completions/clipped_ratio"] == 0.25
    assert found["completions/mean_terminated_length"] == 4
    assert found["completions/mean_right_length"] == 4
    assert found["completions/mean_wrong_length"] == 8
    assert found["accuracy"] == 0.75


def test_a_part_that_is_no_verdict_is_not_taken_for_accuracy() -> None:
    found = round_metrics([rollout(0, 1.0, 3, short=1.0), rollout(0, 0.0, 9, short=0.0)], "")
    assert not {"accuracy", "completions/mean_right_length"} & found.keys()


def test_a_group_all_wrong_tells_nothing_however_long_its_answers_are() -> None:
    """DAPO's dynamic sampling counts right answers: its own penalty of length is not looked at."""
    wrong = [rollout(0, -0.5, 9, correct=0.0), rollout(0, 0.0, 3, correct=0.0)]
    assert not is_flat(wrong)
    assert is_flat(wrong, "correct")
    mixed = [rollout(0, 0.5, 9, correct=1.0), rollout(0, 0.5, 3, correct=0.0)]
    assert is_flat(mixed)
    assert not is_flat(mixed, "correct")


def test_an_answer_without_a_reward_counts_as_that_and_as_nothing_else() -> None:
    """Pitfall 13: a mean over nothing is left out, and is no NaN."""
    found = round_metrics([rollout(0, math.nan, 3, correct=None)] * 2, "correct")
    assert found["frac_unscored"] == 1
    assert not {"reward", "reward_std", "accuracy", "rewards/correct/mean"} & found.keys()
    assert not any(math.isnan(value) for value in found.values())
    assert np.isnan(right_or_wrong([rollout(0, 0.0, 1, other=1.0)], "correct")).all()
