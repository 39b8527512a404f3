"""Every recipe is a config of `posttrain rl`, whose keys stand there as the recipe has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import ConfigError, load, plain_dict
from posttrain.jobs.rl import Config
from posttrain.losses.cispo import CISPO
from posttrain.losses.policy_loss import PolicyLoss
from posttrain.losses.policy_tokens import PolicyTokens
from posttrain.sampling.request import Sampling
from posttrain.train.first_lines import policy_lines
from posttrain.train.recipes import RECIPES

PAGE = (Path(__file__).parents[2] / "docs" / "rl.md").read_text(encoding="utf-8")
BASE = ["model.path=m", "task.type=countdown"]


def config(*overrides: str) -> Config:
    return load(Config, [], [*BASE, *overrides])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_config(name: str) -> None:
    recipe, made = RECIPES[name], plain_dict(config(f"preset={name}"))
    assert re.fullmatch(r"\d{4}\.\d{5}", recipe.paper)
    assert f"| `{name}` |" in PAGE
    assert recipe.paper in PAGE
    for section, keys in recipe.keys.items():
        assert made[section] is not None
        for key, value in keys.items():
            assert made[section][key] == value, f"{section}.{key}"
    assert plain_dict(Config.model_validate(made)) == made, "resolved.yaml gives the same config"


def test_what_the_user_sets_goes_before_the_recipe() -> None:
    made: Any = config("preset=dapo", "loss.high=0.5", "kl.coef=0.1", "round.resample=2")
    assert (made.loss.low, made.loss.high, made.kl.coef, made.round.resample) == (0.2, 0.5, 0.1, 2)
    other: Any = config("preset=dapo", "loss.type=cispo")
    assert isinstance(other.loss, CISPO)
    assert other.loss.high == CISPO().high


class Own(PolicyLoss):
    """A loss from outside the tree: a file and a method."""

    def per_token(self, tokens: PolicyTokens) -> Any:
        return -tokens.advantages * tokens.logps


def test_a_loss_of_ones_own() -> None:
    made = config("preset=grpo", "loss.type=tests.train.test_recipes:Own", "loss.entropy_coef=0.1")
    assert type(made.loss).__name__ == "Own"
    assert made.loss.entropy_coef == 0.1


def test_dapo_punishes_answers_near_the_limit() -> None:
    made: Any = config("preset=dapo", "sampling.max_new_tokens=100", "round.seq_len=200")
    part = made.rewards["overlong"]
    assert (part.max_length, part.cache) == (100, 20)
    assert list(made.rewards)[-1] == "overlong", "beside the task's own"
    given: Any = {"model": {"path": "m"}, "task": {"type": "countdown"}, "preset": "dapo"}
    short: Any = Config(**given, sampling=Sampling(max_new_tokens=50)).rewards["overlong"]
    assert (short.max_length, short.cache) == (50, 10), "of a section that is made already, too"
    own = ["rewards.overlong.type=overlong", "rewards.overlong.cache=3"]
    mine: Any = config("preset=dapo", "rewards.overlong.max_length=7", *own)
    assert mine.rewards["overlong"].max_length == 7
    assert "overlong" not in config("preset=grpo").rewards


def test_dapo_samples_again_where_all_answers_are_right_or_all_are_wrong() -> None:
    assert config("preset=dapo").round.resample_by == "right"
    assert config("preset=grpo").round.resample_by == "reward"
    short = "rewards={short: {type: length, per: 10}}"
    assert config(short).right == "", "no part is taken for a verdict that is none"
    assert config(short, "round.right=short").right == "short"
    with pytest.raises(ConfigError, match=r"name one in round\.right, or set round\.resample_by"):
        config("preset=dapo", short)
    with pytest.raises(ConfigError, match=r"all 4 of eval\.answers would be the same"):
        config("eval.temperature=0", "eval.answers=4")


def test_what_makes_the_gradient_another_is_said() -> None:
    assert policy_lines(config("preset=rloo")) == []
    [line] = policy_lines(config("preset=rloo", "round.steps=4"))
    assert "3 of 4 steps" in line
    [line] = policy_lines(config("preset=grpo", "sampling.top_p=0.9", "sampling.top_k=5"))
    assert "top_k=5, top_p=0.9" in line
