"""A reward model as a part of a reward: TRL's scores, whatever stands beside an answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from posttrain.config import ConfigError
from posttrain.rewards.reward_model import RewardModel
from posttrain.rewards.scorer import RewardError, Scorer
from posttrain.train.answer_scores import AnswerScores, score_functions
from posttrain.types import Rollout
from tests.rewards.rollouts import rollout


@pytest.fixture(scope="module")
def part(data_dir: Path) -> RewardModel:
    path = str(data_dir / "golden" / "model_rm")
    model = {"path": path, "dtype": "float32", "remat": "none"}
    return RewardModel.model_validate({"model": model, "rows": 1})


@pytest.fixture(scope="module")
def answers(data_dir: Path) -> list[Rollout]:
    """The chosen and the rejected side of the first golden pairs."""
    found = []
    for line in (data_dir / "golden" / "prefs.jsonl").read_text().splitlines()[:4]:
        row = json.loads(line)
        for side in ("chosen", "rejected"):
            given = rollout("x", messages=row[side])
            found.append(
                replace(given, prompt=replace(given.prompt, messages=tuple(row["prompt"])))
            )
    return found


@pytest.fixture(scope="module")
def scores_of(part: RewardModel) -> AnswerScores:
    return AnswerScores("rm", part)


def test_scores_are_those_of_trl(scores_of, part, answers, data_dir):
    """Of TRL's first step of the golden run, which is of these eight answers."""
    log = json.loads((data_dir / "golden" / "reward_b4.json").read_text())["log_history"][0]
    with Scorer({"rm": part}, functions={"rm": scores_of}) as scorer:
        scores = np.array([scored.reward for scored in scorer(answers)])
    assert scores.min() == pytest.approx(log["min_reward"], abs=1e-5)
    assert scores.mean() == pytest.approx(log["mean_reward"], abs=1e-5)
    assert scores.max() == pytest.approx(log["max_reward"], abs=1e-5)
    assert (scores[::2] - scores[1::2]).mean() == pytest.approx(log["margin"], abs=1e-5)


def test_a_score_does_not_depend_on_what_is_scored_beside_it(scores_of, answers):
    together = scores_of(answers)
    longer = replace(answers[0], messages=({"role": "assistant", "content": "so " * 100},))
    among = scores_of([longer, *answers[::-1]])
    np.testing.assert_allclose(among[1:], together[::-1], atol=1e-5)
    empty = replace(answers[0], messages=({"role": "assistant", "content": ""},))
    assert np.isfinite(scores_of([empty])).all()


def test_what_does_not_fit_is_told(part, answers, scores_of):
    with pytest.raises(ConfigError, match=r"rewards\.rm\.seq_len is 99999, and the model's"):
        score_functions({"rm": part.model_copy(update={"seq_len": 99999})})
    short = score_functions({"rm": part.model_copy(update={"seq_len": 16})})
    with (
        Scorer({"rm": part}, functions=short) as scorer,
        pytest.raises(RewardError, match=r"prompt task/0: \d+ tokens of the reward model, more"),
    ):
        scorer(answers)
    cut = part.model_copy(update={"seq_len": 16, "too_long": "truncate_start"})
    values = score_functions({"rm": cut})["rm"](answers)
    assert not np.allclose(np.array(values, float), np.array(scores_of(answers), float))
