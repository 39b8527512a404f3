"""Answers are scored in threads as they come, and judged together at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pytest

from posttrain.config import ConfigError
from posttrain.rewards.base import Gate, HandedReward, ManyReward, Reward
from posttrain.rewards.exact import Exact
from posttrain.rewards.length import Length
from posttrain.rewards.scorer import RewardError, Scorer, Scoring
from posttrain.rewards.think import Think
from posttrain.rewards.total import Shaping
from posttrain.train.round_metrics import round_metrics
from posttrain.types import Rollout
from tests.rewards.rollouts import rollout


class Words(Reward):
    def __call__(self, rollout: Rollout) -> float | None:
        return float(len(rollout.text.split())) or None


class Fails(Reward):
    def __call__(self, rollout: Rollout) -> float | None:
        return 1.0 / (len(rollout.text) - 3)


class Meets(Reward):
    """Comes back only if as many answers as the barrier wants are scored side by side."""

    def __call__(self, rollout: Rollout) -> float | None:
        barrier.wait(timeout=20)
        return 1.0


class Hangs(Reward):
    def __call__(self, rollout: Rollout) -> float | None:
        never.wait(timeout=20)
        return 0.0


class Rank(ManyReward):
    def many(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        lengths = sorted(len(r.text) for r in rollouts)
        return [float(lengths.index(len(r.text))) for r in rollouts]


class Odd(Reward):
    def __call__(self, rollout: Rollout) -> float | None:
        return float("nan")


class FromModel(HandedReward):
    pass


barrier, never = threading.Barrier(4), threading.Event()


def test_parts_by_name_in_order_and_answers_in_order():
    parts = {"words": Words(), "rank": Rank(weight=10.0)}
    given = [rollout("a b c"), rollout("a"), rollout("")]
    with Scorer(parts) as scorer:
        scored = scorer(given)
    assert [list(r.rewards) for r in scored] == [["words", "rank"]] * 3
    assert [r.rewards["words"] for r in scored] == [3.0, 1.0, None]
    assert [r.reward for r in scored] == [23.0, 11.0, 0.0]
    assert [r.text for r in scored] == ["a b c", "a", ""]


def test_answers_are_scored_while_others_are_still_awaited():
    with Scorer({"meets": Meets()}, Shaping(threads=4)) as scorer:
        begun = [scorer.start(rollout("x")) for _ in range(4)]
        while not all(scoring.values.done() for scoring in begun):
            time.sleep(0.001)
        assert [r.reward for r in scorer.finish(begun)] == [1.0] * 4


def test_an_error_names_the_reward_and_the_prompt():
    with Scorer({"words": Words(), "bad": Fails()}) as scorer:
        with pytest.raises(RewardError, match=r"'bad' \(.*Fails\) on prompt gsm8k/7: ZeroDiv"):
            scorer([rollout("ab"), rollout("abc", id="gsm8k/7")])
        assert scorer([rollout("abcd")])[0].reward == 2.0, "and the threads live on"


def test_a_value_that_is_no_number_is_an_error():
    with Scorer({"odd": Odd()}) as scorer, pytest.raises(RewardError, match="gave nan"):
        scorer([rollout("x")])


def test_a_reward_that_hangs_is_named():
    with Scorer({"slow": Hangs()}, Shaping(timeout=0.05, threads=1)) as scorer:
        with pytest.raises(RewardError, match=r"'slow'.* on prompt task/0: no value after"):
            scorer([rollout("x")])
        never.set()


def test_a_value_that_comes_as_the_wait_for_it_ends_is_a_value():
    class Late(Future):
        def result(self, timeout: float | None = None) -> dict[str, float | None]:
            if not self.done():
                self.set_result({"words": 2.0})
                raise TimeoutError
            return super().result(timeout)

    with Scorer({"words": Words()}) as scorer:
        assert scorer.finish([Scoring(rollout("a b"), Late())])[0].reward == 2.0


def test_only_some_tasks_and_the_function_that_a_job_hands_in():
    asked: list[int] = []

    def scores(rollouts: Sequence[Rollout]) -> list[float | None]:
        asked.append(len(rollouts))
        return [float(len(r.text)) for r in rollouts]

    parts = {"rm": FromModel(only=("chat",)), "short": Length(per=1, unit="characters")}
    given = [rollout("abc", source="math"), rollout("abcd", source="chat")]
    with Scorer(parts, functions={"rm": scores}) as scorer:
        scored = scorer(given)
    assert asked == [1]
    assert [r.rewards["rm"] for r in scored] == [None, 4.0]
    assert [r.reward for r in scored] == [-3.0, 0.0]
    with pytest.raises(ValueError, match="rewards rm: score by a model"):
        Scorer(parts)
    none = Scorer(parts, functions={"rm": lambda rollouts: []})
    with none, pytest.raises(RewardError, match="gave 0 values for 1"):
        none(given)


def test_all_that_is_wrong_between_parts_at_once():
    parts = {"a": Words(weight=0, gate=Gate(part="a")), "b": Words(weight=0, gate=Gate(part="aa"))}
    with pytest.raises(ConfigError) as error:
        Scorer(parts)
    text = str(error.value)
    assert "3 problems" in text
    assert "rewards.a.gate.part: is the part itself" in text
    assert "rewards.b.gate.part: no part 'aa'; did you mean 'a'?" in text
    with pytest.raises(ConfigError, match="there is none"):
        Scorer({})


def test_a_hackable_reward_is_hacked_and_its_parts_show_it():
    """Form and length are paid for too well. A policy over four ways to answer, reinforced by what
    each way earned, ends with the way that is wrong: its sum rises, and `correct` falls to 0."""
    parts = {
        "correct": Exact(extract=r"\d+"),
        "form": Think(weight=0.5),
        "longer": Length(per=1, unit="words", weight=-0.1),
        "elsewhere": Words(only=("no such task",)),
    }
    ways = ["4", "<think>2 + 2</think>4", "5", f"<think>{'well ' * 30}</think>5"]
    chances = np.array([0.3, 0.4, 0.2, 0.1])
    rng, seen = np.random.default_rng(0), []
    with Scorer(parts, Shaping(threads=2)) as scorer:
        for _ in range(12):
            drawn = rng.choice(4, size=32, p=chances)
            scored = scorer([rollout(ways[way], "4") for way in drawn])
            seen.append(round_metrics(scored, "correct"))
            earned = np.array([r.reward for r in scored])
            gained = np.bincount(drawn, earned - earned.mean(), 4)
            chances = chances * np.exp(gained / np.maximum(np.bincount(drawn, minlength=4), 1))
            chances /= chances.sum()
    first, last = seen[0], seen[-1]
    assert last["reward"] > first["reward"] + 1, "by its sum the policy has learned"
    assert first["rewards/correct/mean"] > 0.5
    assert last["rewards/correct/mean"] < 0.05
    assert last["rewards/form/mean"] > 0.95
    assert last["rewards/longer/mean"] < 2 * first["rewards/longer/mean"] < 0
    assert first["rewards/elsewhere/applied"] == 0.0, "and a part that never applied is seen"
    assert "rewards/correct/applied" not in first
