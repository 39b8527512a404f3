"""Judges on the loopback: ratings, comparisons both ways round, and judges that ramble."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain import openai_client
from posttrain.rewards import judging
from posttrain.rewards.judge import Judge
from posttrain.rewards.judge_pairs import JudgePairs
from posttrain.rewards.scorer import RewardError, Scorer
from tests.http_server import said, serving
from tests.rewards.rollouts import rollout


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "_FIRST_WAIT", 0.001)


def content(body: Any) -> str:
    return body["messages"][-1]["content"]


def by_length(number: int, body: Any) -> tuple[int, Any, dict[str, str]]:
    """Prefers the longer answer, and says so at length."""
    a, b = (re.search(f"<answer_{x}>\n(.*)\n</answer_{x}>", content(body))[1] for x in "ab")
    verdict = "C" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return 200, said(f"Not [[C]], since one is longer. [[{verdict}]]"), {}


def first_one(number: int, body: Any) -> tuple[int, Any, dict[str, str]]:
    return 200, said("The first is better. [[A]]"), {}


def test_a_rating():
    answers = ["Rating: [[7]]", "First [[2]], but on reflection [[10]].", "[[ 5.5 / 10 ]]"]
    with serving(lambda number, body: (200, said(answers[number]), {})) as served:
        part = Judge.model_validate(
            {
                "endpoint": {"base_url": served.base_url, "model": "judge"},
                "asking": {"instructions": "Be strict.", "temperature": 0.5},
                "reference": True,
            }
        )
        given = rollout("<think>hm</think>It is {low} 4.", "four", question="2+2? {answer}")
        assert [part(given) for _ in range(3)] == [pytest.approx(x / 9) for x in (6, 9, 4.5)]
    body = served.asked[0][1]
    assert body["messages"][0] == {"role": "system", "content": "Be strict."}
    assert (body["model"], body["temperature"]) == ("judge", 0.5)
    text = content(body)
    assert "<question>\n2+2? {answer}\n</question>" in text, "what is put in is put in as it is"
    assert "<answer>\nIt is {low} 4.\n</answer>" in text, "without the thinking"
    assert "<right_answer>\nfour\n</right_answer>" in text
    assert "from 1 (useless) to 10 " in text


def test_a_judge_that_rambles_is_asked_again():
    answers = ["Hm.", "[[11]]", "[[1]]"]
    with serving(lambda number, body: (200, said(answers[number]), {})) as served:
        endpoint = {"base_url": served.base_url, "model": "judge"}
        assert Judge.model_validate({"endpoint": endpoint})(rollout("x")) == 0.0
    assert [body.get("seed") for _, body, _ in served.asked] == [None, 1, 2]
    with serving(lambda number, body: (200, said("Hm."), {})) as served:
        endpoint = {"base_url": served.base_url, "model": "judge"}
        part = Judge.model_validate({"endpoint": endpoint})
        with (
            Scorer({"judge": part}) as scorer,
            pytest.raises(RewardError, match=r"'judge'.*task/7: .*3 times and gave no verdict"),
        ):
            scorer([rollout("x", id="task/7")])
        lax = Judge.model_validate({"endpoint": endpoint, "asking": {"unreadable": "none"}})
        assert lax(rollout("x")) is None


def test_a_server_that_is_busy_and_answers_that_are_kept(tmp_path: Path):
    answers = [(503, "busy", {}), (200, said("[[10]]"), {})]
    with serving(lambda number, body: answers[number]) as served:
        endpoint = {"base_url": served.base_url, "model": "j", "cache_dir": str(tmp_path)}
        part = Judge.model_validate({"endpoint": endpoint})
        assert [part(rollout("x")), part(rollout("x"))] == [1.0, 1.0]
        assert len(served.asked) == 2


def test_what_is_put_in_is_put_in_once():
    assert judging.filled("{a} {b} {c}", a="{b}", b="x") == "{b} x {c}"


def pairs(base_url: str, **settings: Any) -> JudgePairs:
    return JudgePairs.model_validate({"endpoint": {"base_url": base_url, "model": "j"}, **settings})


def test_answers_of_a_group_meet_both_ways_round():
    given = [
        rollout("aaa", group=1),
        rollout("a", group=1),
        rollout("alone", group=2),
        rollout("aa", group=1),
    ]
    with serving(by_length) as served:
        assert pairs(served.base_url).many(given) == [1.0, 0.0, None, 0.5]
        assert len(served.asked) == 6, "three pairs, two questions each"
        assert pairs(served.base_url, opponents=9).many(given) == [1.0, 0.0, None, 0.5]
        assert len(served.asked) == 12


def test_a_judge_that_likes_what_stands_first_decides_nothing():
    given = [rollout("aaa"), rollout("a")]
    with serving(first_one) as served:
        assert pairs(served.base_url).many(given) == [0.5, 0.5]
        assert pairs(served.base_url, swap=False).many(given) == [1.0, 0.0]
        asked = len(served.asked)
        assert pairs(served.base_url).many([rollout("same"), rollout("same ")]) == [0.5, 0.5]
        assert len(served.asked) == asked, "equal answers need no judge"


def test_against_the_answer_of_the_prompt():
    given = [rollout("longer", "short"), rollout("x", "short"), rollout("x")]
    with serving(by_length) as served:
        assert pairs(served.base_url, against="answer").many(given) == [1.0, 0.0, None]


def test_what_is_wrong_with_the_config_or_the_server():
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "j", "retries": 0}
    with pytest.raises(ValidationError, match=r"low \(3\) must be less than high \(3\)"):
        Judge.model_validate({"endpoint": endpoint, "low": 3, "high": 3})
    with pytest.raises(ValidationError, match=r"template: \{other\} must stand in it"):
        JudgePairs.model_validate({"endpoint": endpoint, "template": "{answer}"})
    away = JudgePairs.model_validate({"endpoint": endpoint})
    with (
        Scorer({"pairs": away}) as scorer,
        pytest.raises(RewardError, match=r"on prompt t/1: .*refused"),
    ):
        scorer([rollout("a", id="t/1"), rollout("b", id="t/1")])
    empty = {"choices": list[str]()}
    with (
        serving(lambda number, body: (200, empty, {})) as served,
        pytest.raises(RuntimeError, match="the server's answer has no choice"),
    ):
        pairs(served.base_url).many([rollout("a"), rollout("b")])
