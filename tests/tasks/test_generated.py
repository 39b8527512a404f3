"""arithmetic and countdown: the answers are right, the limits hold, expressions are not run."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest

from posttrain.tasks import TASKS
from posttrain.tasks.countdown import correct, evaluate
from posttrain.types import Prompt, Rollout


def rollout(text: str, answer: object) -> Rollout:
    nothing = np.zeros(0, np.float32)
    prompt = Prompt("countdown/train/0", (), answer)
    said = {"role": "assistant", "content": text}
    return Rollout(prompt, (said,), text, "stop", nothing, nothing, nothing, nothing)


@pytest.mark.parametrize("operators", [("+", "-"), ("+", "-", "*")])
def test_arithmetic_answers_are_those_of_python(operators):
    task = TASKS["arithmetic"](size=300, operators=operators, largest=12, question="= {problem}")
    counts = Counter()
    for prompt in task.prompts("train"):
        problem = prompt.messages[-1]["content"].removeprefix("= ")
        assert re.fullmatch(r"\d+([-+*]\d+){2,4}", problem)
        assert int(prompt.answer) == eval(problem)
        for end in re.finditer(r"(?=[-+*]|$)", problem):
            assert 0 <= eval(problem[: end.start()]) <= 20
        counts.update(re.findall(r"[-+*]", problem))
        assert all(1 <= int(n) <= 12 for n in re.findall(r"\d+", problem))
    assert set(counts) == set(operators)


def values_of(numbers: list[Fraction]) -> set[Fraction]:
    """Whatever can be made of the numbers, by trying everything."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for a, b, *rest in permutations(numbers):
        made = {a + b, a - b, a * b} | ({a / b} if b else set())
        for value in made:
            found |= values_of([value, *rest])
    return found


def test_countdown_targets_can_be_reached():
    task = TASKS["countdown"](size=20, numbers=(3, 3), largest=20)
    for prompt in task.prompts("train"):
        numbers, target = prompt.answer["numbers"], prompt.answer["target"]
        assert 1 <= target <= 100
        assert target not in numbers
        assert Fraction(target) in values_of([Fraction(n) for n in numbers])
        said = prompt.messages[-1]["content"]
        assert said.startswith(f"Make {target} from the numbers {', '.join(map(str, numbers))}.\n")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("I try. <answer>(3 + 5) * 2</answer>", 1),
        ("<answer>1</answer> no: <answer> (5+3)*2 = 16 </answer>", 1),
        ("So it is\n(3+5)\N{MULTIPLICATION SIGN}2", 1),
        ("<answer>3 / (5 - 2) + 15</answer>", 0),  # another number
        ("<answer>3 + 5 * 2</answer>", 0),  # another value
        ("<answer>8 * 2</answer>", 0),
        ("<answer>(3 + 5) * 2 * 2 / 2</answer>", 0),  # twice
        ("<answer>(3 + 5) * 2", 0),
        ("(3 + 5) * 2\nThat is it.", 0),
        ("<answer>__import__('os').getpid()</answer>", 0),
        ("<answer>(3 + 5) ** 2</answer>", 0),
        ("<answer>16.0</answer>", 0),
        ("", 0),
    ],
)
def test_countdown_takes_an_expression_of_each_number_once(text, score):
    assert correct(rollout(text, {"numbers": [2, 3, 5], "target": 16})) == score


def test_countdown_is_exact_and_runs_nothing():
    assert evaluate("8 / (3 - 8 / 3)") == (24, Counter({8: 2, 3: 2}))
    for text in ("1 / 0", "1 / (3 - 3)", "(" * 150 + "1", "9" * 300, "True + 1", "-1", "a", "1, 2"):
        value, _ = evaluate(text)
        assert value is None, text
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert evaluate("3and 4")[0] is None
    assert not warned, "what a model writes puts no warning of Python's into the log"
