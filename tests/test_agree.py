"""What the processes of a run must have in common, and who is named where one has not."""

from __future__ import annotations

import pytest

from posttrain.agree import agree, agree_on_run, code, verdict
from posttrain.jobs.doctor import Config


def said(host: str, lr: float = 0.1, **more: object) -> dict:
    return {"host": host, "has": {"config": {"optim": {"lr": lr, "b": 2}}, "code": "ab", **more}}


def test_one_process_agrees_with_itself() -> None:
    agree_on_run(Config(), 1)
    agree({"data": "x"}, 1)
    assert len(code()) == 16


def test_who_has_the_same_as_the_others_is_let_on() -> None:
    assert verdict([said("a"), said("b"), said("c")], 1) == {"text": "", "wrong": False}


@pytest.mark.parametrize(
    ("words", "wrong", "parts", "not_said"),
    [
        (
            [said("a", 0.2), said("b"), said("c")],
            True,
            ["(2 of 3 do)", "process 0 on a: optim.lr is 0.2, not 0.1"],
            ["optim.b", "process 1", "process 2"],
        ),
        (
            [said("a"), said("b", 0.3, data="x")],
            True,
            ["(1 of 2 do)", "process 1 on b: optim.lr is 0.3, not 0.1; data is 'x', not None"],
            ["process 0"],
        ),
        (
            [said("a"), said("b", code="cd"), None],
            True,
            ["process 1 on b: code is 'cd', not 'ab'", "process 2 has told nothing"],
            [],
        ),
        ([said("a"), None, None], False, ["process 1, 2 of 3 has not told", "within 7 s"], []),
    ],
    ids=["the first is odd", "one against one", "one odd, one silent", "silent"],
)
def test_the_odd_one_is_named(
    words: list, wrong: bool, parts: list[str], not_said: list[str]
) -> None:
    found = verdict(words, 7)
    assert found["wrong"] == wrong
    assert all(part in found["text"] for part in parts), found["text"]
    assert not any(part in found["text"] for part in not_said), found["text"]


def test_of_many_differences_the_first_are_told() -> None:
    other = said("b")
    other["has"]["config"] = {"optim": {f"key{i}": i for i in range(20)}}
    text = verdict([said("a"), said("c"), other], 1)["text"]
    assert "and 14 more" in text
    assert len(text) < 600
