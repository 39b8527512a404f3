"""Rewards that read the text alone: exact, regex, length, over-long, repetition."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from posttrain.rewards.exact import Exact
from posttrain.rewards.length import Length, Overlong
from posttrain.rewards.regex import Regex
from posttrain.rewards.repetition import Repetition
from tests.rewards.rollouts import rollout


@pytest.mark.parametrize(
    ("settings", "text", "answer", "value"),
    [
        ({}, "Paris", "Paris", 1.0),
        ({}, " Paris\n", "Paris", 1.0),
        ({"ignore_space": False}, " Paris\n", "Paris", 0.0),
        ({}, "paris", "Paris", 0.0),
        ({"ignore_case": True}, "paris", "Paris", 1.0),
        ({}, "It is Paris", "Paris", 0.0),
        ({"extract": r"is (\w+)"}, "It is Rome. No: it is Paris", "Paris", 1.0),
        ({"extract": r"\d+"}, "none", "4", 0.0),
        ({"extract": r"\d+"}, "3 or 4", 4, 1.0),
        ({}, "Big Apple", ["New York", "Big Apple"], 1.0),
        ({"key": "final"}, "4", {"final": "4"}, 1.0),
        ({"key": "last"}, "4", {"final": "4"}, None),
        ({}, "4", None, None),
        ({}, r"B looks right, but it is \boxed{C}.", "C", 1.0),
        ({}, r"C? \boxed{B}", "C", 0.0),
        ({}, r"\boxed{\text{New York}}", "New York", 1.0),
        ({}, r"\boxed{\text{B} or \text{C}}", "C", 0.0),
        ({}, "<think>it is 5</think>4", "4", 1.0),
        ({}, "<think>it is 4", "4", 0.0),
    ],
)
def test_exact(settings, text, answer, value):
    assert Exact(**settings)(rollout(text, answer)) == value


def test_regex():
    assert Regex(pattern=r"\d+$")(rollout("it is 4")) == 1.0
    assert Regex(pattern=r"\d+", match="whole")(rollout("it is 4")) == 0.0
    assert Regex(pattern="<think>")(rollout("<think>a</think>b")) == 0.0
    assert Regex(pattern="<think>", of="text")(rollout("<think>a</think>b")) == 1.0
    assert Regex(pattern="PARIS", ignore_case=True)(rollout("paris")) == 1.0
    with pytest.raises(ValidationError, match="no regular expression: missing"):
        Regex(pattern="(")


def test_soft_overlong_punishment():
    part = Overlong(max_length=100, cache=20)
    got = [part(rollout(length=n)) for n in (50, 80, 90, 100, 110)]
    assert got == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ValidationError, match=r"cache \(30\) is more than max_length \(20\)"):
        Overlong(max_length=20, cache=30)


def test_length():
    assert Length(per=100)(rollout(length=50)) == -0.5
    assert Length(per=10, target=100)(rollout(length=90)) == -1.0
    assert Length(per=10, target=100, longer_only=True)(rollout(length=90)) == 0.0
    assert Length(per=10, target=100, longer_only=True)(rollout(length=120)) == -2.0
    assert Length(per=1, unit="words")(rollout("a bb c")) == -3.0
    assert Length(per=1, unit="characters")(rollout("a bb c")) == -6.0


def test_an_answer_without_tokens_has_no_length_in_them():
    from dataclasses import replace

    nothing = np.zeros(0, np.float32)
    remote = replace(rollout("a b"), tokens=nothing.astype(np.int32), loss_weights=nothing)
    with pytest.raises(ValueError, match="no length in tokens"):
        Length(per=1)(remote)
    assert Length(per=1, unit="words")(remote) == -2.0


def test_repetition():
    assert Repetition(n=2)(rollout("No no no NO no")) == -0.75
    assert Repetition(n=2)(rollout("one two three")) == 0.0
    assert Repetition(n=2)(rollout("one")) == 0.0
    assert Repetition(n=1, unit="tokens")(rollout("a b a b")) == -0.5, "the prompt is not counted"
