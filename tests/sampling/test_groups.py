"""Scored answers come prompt by prompt, in order, the same however many are asked at once; and
what is counted of them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from posttrain.chat.template import ChatTemplate
from posttrain.chat.templates import TEMPLATES
from posttrain.config import ConfigError
from posttrain.rewards.base import ManyReward, Reward
from posttrain.rewards.scorer import Scorer
from posttrain.sampling.groups import answer_all, refuse
from posttrain.sampling.tally import counts, figures, kept, told
from posttrain.types import Rollout
from tests.rewards.rollouts import rollout
from tests.sampling.scripted import SAMPLING, TOOLS, Scripted, prompt, template

PROMPTS = [prompt(f"{i}?", name=f"p{i}") for i in range(5)]


class Length(Reward):
    def __call__(self, rollout: Rollout) -> float:
        return float(len(rollout.text))


ASKED: list[int] = []


class Mean(ManyReward):
    def many(self, rollouts: Sequence[Rollout]) -> list[float]:
        ASKED.append(len(rollouts))
        return [float(len(r.text)) for r in rollouts]


def engine(chat: ChatTemplate) -> Scripted:
    """Which of the n it is, as many letters, and a stop."""

    def answer(request: Any, which: int) -> list[int]:
        return [*chat.tokenizer.encode("x" * (which + 1)).ids, chat.stop_ids[0]]

    return Scripted(answer)


def ask(chat: ChatTemplate, reward: Reward, **more: Any) -> list[tuple[int, list[Rollout]]]:
    found: list[tuple[int, list[Rollout]]] = []
    with Scorer({"length": reward}) as scorer:
        answer_all(
            PROMPTS, engine(chat), chat, SAMPLING, scorer,
            lambda i, group: found.append((i, group)),
            **{"n": 3, "seed": 0} | more,
        )  # fmt: skip
    return found


@pytest.mark.parametrize("reward", [Length(), Mean()])
@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_groups_come_in_order_with_their_rewards(chatml, reward, at_once):
    found = ask(chatml, reward, at_once=at_once)
    assert [i for i, _ in found] == [0, 1, 2, 3, 4]
    for i, group in found:
        assert [r.prompt.id for r in group] == [f"p{i}"] * 3
        assert [r.rewards["length"] for r in group] == [1.0, 2.0, 3.0]
        assert [r.reward for r in group] == [1.0, 2.0, 3.0]


def test_one_goes_on_in_the_middle(chatml):
    found = ask(chatml, Length(), first=3, at_once=2)
    assert [(i, group[0].prompt.id) for i, group in found] == [(3, "p3"), (4, "p4")]


def test_rewards_that_judge_many_are_asked_about_all_that_were_handed_over(chatml):
    ASKED.clear()
    ask(chatml, Mean(), at_once=2)
    assert ASKED == [6, 6, 3]


def test_a_group_is_told_while_others_are_being_answered(chatml):
    """The third prompt is answered only once the first one's rewards have been told."""
    first_told, seen = threading.Event(), []
    plain = engine(chatml)

    def answer(request: Any, which: int) -> Sequence[int]:
        if "2?" in chatml.tokenizer.decode(list(request.tokens)):
            seen.append(first_told.is_set())
        return plain.answer(request, which)

    class Quick(Reward):
        def __call__(self, rollout: Rollout) -> float:
            return 1.0

    scorer = Scorer({"quick": Quick()})
    start = scorer.start

    def started(given: Rollout) -> Any:  # rewards are quicker than sampling here
        scoring = start(given)
        scoring.values.result()
        return scoring

    scorer.start = started  # type: ignore[method-assign]
    with scorer:
        answer_all(
            PROMPTS[:3], Scripted(answer), chatml, SAMPLING, scorer,
            lambda i, group: first_told.set(), n=2, seed=0,
        )  # fmt: skip
    assert seen == [True, True]


def test_what_fails_while_several_processes_sample_is_raised_where_all_learn_of_it(chatml):
    """Raised in the midst of a program, it would leave the others waiting in the next."""
    inner, ended = engine(chatml), []

    class Counting(Scripted):
        def generate(self, requests: Any, on_done: Any = None) -> Any:
            def heard(index: int, which: int, done: Any) -> Any:
                if (index, which) == (1, 0):
                    time.sleep(0.3)  # meanwhile the first group is judged
                return on_done(index, which, done)

            found = inner.generate(requests, heard)
            ended.append(len(requests))
            return found

    def full(i: int, group: list[Rollout]) -> None:
        raise OSError("no space left")

    def alone_or_not(share: Any) -> None:
        with Scorer({"length": Length()}) as scorer:
            answer_all(
                PROMPTS, Counting(inner.answer), chatml, SAMPLING, scorer, full, n=3, seed=0,
                share=share,
            )  # fmt: skip

    with pytest.raises(OSError, match="no space"):
        alone_or_not(lambda make: make())
    assert ended == [len(PROMPTS)], "all was sampled, as on the others"


def test_prompts_that_cannot_be_asked_are_refused_before_anything_runs(chatml, data_dir):
    sizes = [len(chatml.generation_prompt(p.messages)) for p in PROMPTS]
    room = max(sizes) + SAMPLING.max_new_tokens
    assert refuse(PROMPTS, chatml, SAMPLING, {}, room) == min(sizes)
    long = prompt("?" * 50, name="long")
    with pytest.raises(ConfigError, match=r"1 of 6 prompts(.|\n)*long: \d+ tokens"):
        refuse([*PROMPTS, long], chatml, SAMPLING, {}, room)
    few = f"{len(PROMPTS)} of 5 train prompts(.|\n)*longest has {max(sizes)}"
    with pytest.raises(ConfigError, match=few):
        refuse(PROMPTS, chatml, SAMPLING, {}, SAMPLING.max_new_tokens, split="train")
    without = "{% if tools %}{{ raise_exception('no tools here') }}{% endif %}"
    chat = template(data_dir, without + TEMPLATES["chatml"])
    refuse(PROMPTS, chat, SAMPLING, {}, room)
    with pytest.raises(ConfigError, match=r"5 of 5 prompts(.|\n)*p0: .*no tools here"):
        refuse(PROMPTS, chat, SAMPLING, TOOLS, room)
    silent = "{%- else -%}", "{%- elif message.role != 'tool' -%}"
    assert silent[0] in TEMPLATES["chatml"]
    chat = template(data_dir, TEMPLATES["chatml"].replace(*silent))
    refuse(PROMPTS, chat, SAMPLING, {}, None)
    refuse(PROMPTS, chat, SAMPLING, TOOLS, None, max_turns=1)  # no call is run
    with pytest.raises(ConfigError, match=r"5 of 5 prompts(.|\n)*p0: .*of a tool message"):
        refuse(PROMPTS, chat, SAMPLING, TOOLS, None)


def scored(*values: float | None, **more: Any) -> list[Rollout]:
    made = []
    for k, value in enumerate(values):
        own = rollout(f"It is {k % 2}", rewards={"correct": value, "form": 0.5}, **more)
        object.__setattr__(own, "reward", math.nan if value is None else value)
        made.append(own)
    return made


def test_what_is_counted_of_a_prompt():
    line = counts(scored(1.0, 0.0, 1.0, 0.0), "correct", 1.0)
    assert line["right"] == [True, False, True, False]
    assert (line["majority"], line["best"]) == (0.5, 1.0)
    assert (line["tokens"], line["cut_off"]) == ([3, 3, 3, 3], 0)
    line = counts(scored(None, None), "correct", 1.0)
    assert "right" not in line
    assert line["reward"] == [None, None]
    assert counts(scored(None, 0.5), "correct", 0.5)["right"] == [False, True]


def test_figures_are_means_over_prompts():
    lines = [
        counts(scored(1.0, 0.0, 1.0), "correct", 1.0),
        counts(scored(0.0, 0.0, 0.0), "correct", 1.0),
        counts(scored(None, None, None), "correct", 1.0),
    ]
    found = figures(lines)
    assert {name: mean for name, (mean, _) in found.items()} == pytest.approx(
        {
            "reward": 1 / 3,
            "rewards/correct": 1 / 3,
            "rewards/form": 0.5,
            "pass@1": 1 / 3,
            "pass@2": 0.5,
            "pass@3": 0.5,
            "maj@3": 0.5,
            "best@3": 0.5,
        }
    )
    assert found["pass@1"][1] == pytest.approx((2 / 9) ** 0.5 / 2**0.5)
    said = told(lines)
    assert said[0] == "3 prompts, 9 answers of 3.0 tokens on average, 0 cut off"
    assert "  pass@1           0.3333 ± 0.3333" in said
    assert said[-1] == "  rewards/correct applied to 6 of 9 answers"
    assert told(lines[:2])[-1].startswith("  best@3"), "to all of them: not worth a word"


def test_what_became_of_the_answers_is_said():
    lines = [
        counts(scored(1.0, 0.0), "correct", 1.0)
        | {"rows": 1, "kept": 1, "dropped": {"duplicate": 1}},
        counts(scored(0.0, 0.0), "correct", 1.0)
        | {"rows": 0, "kept": 0, "dropped": {"duplicate": 1, "below at_least": 1}},
    ]
    assert kept(lines) == [
        "1 rows of 1 of 4 answers; 1 of 2 prompts gave none",
        "         2 duplicate",
        "         1 below at_least",
    ]
