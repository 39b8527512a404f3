"""docs/rewards.md: every reward and its settings are told, and what it shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from posttrain.config import Config, load, semantic
from posttrain.rewards import REWARDS
from posttrain.rewards.base import Reward
from posttrain.rewards.scorer import Scorer
from posttrain.rewards.total import RewardParts, Shaping
from tests.rewards.rollouts import rollout

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


class Job(Config):
    rewards: RewardParts = semantic(help="the parts")
    shaping: Shaping = semantic(Shaping(), help="the sum")


def test_every_reward_and_its_settings_are_told():
    rows = dict(re.findall(r"^\| `(\w+)` (\|.*)$", PAGE, re.MULTILINE))
    for name, cls in REWARDS.items():
        assert name in rows, f"no row of {name}"
        for setting in cls.model_fields.keys() - Reward.model_fields.keys():
            assert f"`{setting}`" in rows[name], f"{name}: {setting} is not told"
    for setting in Reward.model_fields:
        assert f"| `{setting}:" in PAGE, f"{setting} is not told"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    first, own, judge = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    jobs = []
    for text in (first, own, judge):
        (tmp_path / "job.yaml").write_text(text)
        jobs.append(load(Job, [tmp_path / "job.yaml"]))
    answers = [
        rollout("<think>2 + 2</think>4, please, as income", "4"),
        rollout("4", "4"),
        rollout("<think>2 + 2</think>5", "4"),
    ]
    with Scorer(jobs[0].rewards, jobs[0].shaping) as scorer:
        assert [r.reward for r in scorer(answers)] == [1.2, 0.0, 0.2]
    with Scorer(jobs[1].rewards, jobs[1].shaping) as scorer:
        scored = scorer(answers)
    assert [r.rewards for r in scored] == [
        {"polite": 1.0, "topic": 0.5},
        *[{"polite": 0.0, "topic": 0.0}] * 2,
    ]
    assert scored[0].reward == pytest.approx(0.6)
