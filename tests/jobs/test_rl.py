"""`posttrain rl` from config to export: it learns, it reports, it goes on where it was."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.jobs.runs import Finished, Runner


@pytest.fixture(scope="module")
def learned(run_rl: Runner) -> Finished:
    """Twelve rounds with all that is switched on beside them."""
    keys = ["train.steps=12", "eval.prompts=8", "eval.every=12", "rollouts.every=4", "export=true"]
    size = ["round.prompts=8", "round.answers=8", "round.micro_tokens=1024", "round.slots=16"]
    return run_rl(*keys, *size, "optim.lr=5e-2")


def lines(run: Finished) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_random_model_learns_to_say_what_earns_rewards(learned: Finished) -> None:
    rewards = [line["reward"] for line in learned.metrics]
    assert learned.code == 0
    assert np.mean(rewards[:2]) < 0.55
    assert np.mean(rewards[-2:]) > 0.75, rewards
    before, after = (line for line in lines(learned) if "eval/letters/reward" in line)
    assert (before["step"], after["step"]) == (0, 12)
    assert after["eval/letters/reward"] > before["eval/letters/reward"] + 0.2
    assert (learned.folder / "export" / "model.safetensors").exists()
    assert "Reinforcement learning" in (learned.folder / "export" / "README.md").read_text()


def test_what_is_reported_of_a_step(learned: Finished) -> None:
    first = learned.metrics[0]
    assert first["answers"] == 64
    assert first["rewards/share/mean"] == pytest.approx(first["reward"])
    assert {"reward_std", "frac_reward_zero_std", "entropy", "completions/clipped_ratio"} <= {
        *first
    }
    assert {"time/sampling", "time/rewards", "time/passes", "time/training"} <= {*first}
    assert first["sampled_tokens_per_second"] > 0
    assert first["entropy"] == pytest.approx(np.log(6400), rel=0.02)
    assert first["sampling/sampling_logp_difference/mean"] < 1e-5
    assert first["sampling/sampling_logp_difference/max"] < 1e-4
    assert first["examples"] == 64
    assert first["epoch"] == 8 / 64
