"""`posttrain rl` from config to export: it learns, it reports, it goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain import config
from posttrain.config import ConfigError
from posttrain.jobs import rl
from posttrain.losses.cispo import CISPO
from posttrain.losses.clip import Clip
from tests.jobs.rl_task import HERE
from tests.jobs.runs import Finished, Runner

SIZE = [
    *("round.prompts=8", "round.answers=8", "round.micro_tokens=1024", "round.slots=16"),
    "optim.lr=5e-2",
]


@pytest.fixture(scope="module")
def learned(run_rl: Runner) -> Finished:
    """Twelve rounds with all that is switched on beside them."""
    keys = ["train.steps=12", "eval.prompts=8", "eval.every=12", "rollouts.every=4", "export=true"]
    return run_rl(*keys, *SIZE)


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


def test_adapters_learn_on_a_task_of_ours_and_are_held_to_the_model_below_them(
    run_rl: Runner,
) -> None:
    """The reference is the model without its adapters, which begin as nothing: KL 0."""
    keys = ["task.type=arithmetic", "task.size=24", "lora.rank=2", "kl.coef=0.1", "train.steps=2"]
    keys += ["model.dtype=bfloat16", "round.seq_len=128", "round.order=sequential"]
    run = run_rl(*keys, "export=true", "optim.lr=1e-2")
    first, second = run.metrics
    assert abs(first["kl"]) < 1e-4
    assert first["rewards/correct/mean"] == 0
    assert first["sampling/sampling_logp_difference/mean"] < 0.02, "bfloat16, adapters merged"
    assert (run.folder / "adapter" / "adapter_model.safetensors").exists()
    assert (run.folder / "export" / "model.safetensors").exists()
    assert second["num_tokens"] > first["num_tokens"] > 0
    assert [line["epoch"] for line in run.metrics] == [4 / 24, 8 / 24]


def test_answers_that_nobody_can_score_are_not_trained_on_and_counted(run_rl: Runner) -> None:
    part = f"rewards={{part: {{type: '{HERE}:half_of_them'}}}}"
    (line,) = run_rl(part, *SIZE, "train.steps=1").metrics
    assert 0 < line["answers/untrained"] < 64
    assert line["answers/untrained"] == 64 * line["frac_unscored"]
    assert line["examples"] == 64 - line["answers/untrained"]


def test_a_round_of_which_nothing_is_left_says_why(run_rl: Runner) -> None:
    with pytest.raises(ValueError, match=r"round 0: \d+ of 16 answers can be trained on") as told:
        run_rl(
            "round.mask_truncated=true",
            "train.steps=1",
            "round.steps=4",
            "sampling.max_new_tokens=1",
        )
    assert "were cut off at sampling.max_new_tokens=1" in str(told.value)


def refused(*keys: str) -> str:
    given = ["model.path=/no/model", "task.type=countdown", *keys]
    with pytest.raises(ConfigError) as told:
        config.load(rl.Config, [], given)
    return str(told.value)


def test_all_that_does_not_go_together_is_told_at_once() -> None:
    keys = [
        "advantage.type=gae",
        "sampling.temperature=0",
        "lora.dropout=0.1",
        "round.right=corect",
    ]
    said = refused(*keys, "sampling.max_new_tokens=1024", "preset=grop")
    for part in (
        "asks a critic: set critic: {}",
        "sampling.temperature is 0",
        "lora.dropout: answers are sampled without it",
        "no part of rewards is 'corect'; did you mean 'correct'?",
        "nothing is left for the prompt",
        "no recipe 'grop'; did you mean 'grpo'?",
    ):
        assert part in said, part
    assert "does not read what it foretells" in refused("critic={}")
    assert "known: " in refused("task.type=contdown") or "did you mean" in refused("task.type=cown")


@pytest.mark.parametrize(
    ("keys", "refuses"),
    [
        (["advantage.type=grpo"], True),
        (["advantage.type=rloo"], True),
        (["advantage={type: reinforce_pp, baseline: true}"], True),
        (["advantage.type=reinforce_pp"], False),
        (["advantage.type=reinforce"], False),
    ],
)
def test_one_answer_to_a_prompt_is_refused_where_it_would_teach_nothing(
    keys: list[str], refuses: bool
) -> None:
    given = ["model.path=/no/model", "task.type=countdown", "round.answers=1", *keys]
    if refuses:
        assert "round.answers is 1: advantage type" in refused("round.answers=1", *keys)
    else:
        assert config.load(rl.Config, [], given).round.answers == 1


def test_a_recipes_own_part_is_not_all_that_is_rewarded() -> None:
    said = refused("preset=dapo", "task={type: jsonl, path: sums.jsonl}")
    assert "there is none: name at least one" in said


def test_a_preset_fills_what_is_not_set_and_the_resolved_config_says_all_of_it(
    tmp_path: Path,
) -> None:
    given = ["model.path=/no/model", "task.type=countdown", "preset=dapo", "loss.low=0.1"]
    cfg = config.load(rl.Config, [], given)
    assert cfg.loss == Clip(low=0.1, high=0.28)
    assert cfg.round.resample == 10
    assert set(cfg.rewards) == {"correct", "overlong"}, "the task's, and the recipe's"
    assert cfg.optim.lr == 1e-6
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config.resolved_yaml(cfg))
    assert config.load(rl.Config, [resolved]) == cfg
    short = config.load(rl.Config, [], [*given, "rewards.overlong.cache=7"])
    assert set(short.rewards) == set(cfg.rewards), "a key of its part is set beside the task's"
    assert short.rewards["overlong"].model_dump()["cache"] == 7
    other = config.load(rl.Config, [], [*given[:3], "loss.type=cispo"])
    assert other.loss == CISPO(), "nothing of a recipe's loss is in one of another type"


def test_prompts_that_cannot_fit_are_refused_before_anything_is_sampled(run_rl: Runner) -> None:
    with pytest.raises(ConfigError, match=r"train prompts cannot be asked, or leave no room"):
        run_rl("round.seq_len=10", "train.steps=1")
