"""Countdown, generated: reach a number by +, -, * and / from some others."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from fractions import Fraction
from typing import Any, ClassVar

from pydantic import model_validator

from posttrain.config import semantic
from posttrain.rewards.base import answer_text
from posttrain.tasks.base import Generated, Question, Rewards
from posttrain.types import Rollout

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ARITHMETIC = re.compile(r"[\d\s+\-*/()]*")
_LONGEST = 200  # characters of an expression that is looked at


class Countdown(Generated):
    """Numbers and a target that can be reached by using each of them once (Gandhi et al. 2024,
    arXiv:2404.03683, section 3; Pan et al. 2025, TinyZero, asks for <answer> tags).

    Prompt.answer: {"numbers": [...], "target": n}.
    """

    name = "countdown"
    rewards: ClassVar[Rewards] = {"correct": {"type": "posttrain.tasks.countdown:correct"}}

    numbers: tuple[int, int] = semantic((3, 4), help="fewest and most numbers of a problem")
    largest: int = semantic(99, ge=2, help="the numbers are from 1 to this")
    greatest: int = semantic(100, ge=1, help="targets are from 1 to this")
    instruction: str = semantic(
        "You may use +, -, *, / and brackets, and must use each number exactly once. Think first, "
        "then write the expression alone in tags, as in <answer>(1 + 2) * 3</answer>.",
        help="what is said after every question",
    )

    @model_validator(mode="after")
    def _fits(self) -> Countdown:
        fewest, most = self.numbers
        if not 2 <= fewest <= most <= 8:
            raise ValueError(f"numbers are {self.numbers}: 2 <= fewest <= most <= 8")
        return self

    def draw(self, rng: random.Random) -> Question | None:
        """Numbers, joined two by two at random until one value is left: a target if it fits."""
        numbers = [rng.randint(1, self.largest) for _ in range(rng.randint(*self.numbers))]
        left = [Fraction(n) for n in numbers]
        while len(left) > 1:
            b, a = left.pop(rng.randrange(len(left))), left.pop(rng.randrange(len(left)))
            operator = rng.choice("+-*/" if b else "+-*")
            left.append(_apply(operator, a, b))
        if left[0].denominator != 1 or not 1 <= left[0] <= self.greatest or left[0] in numbers:
            return None
        target, numbers = int(left[0]), sorted(numbers)  # in one order: one question, one hash
        asked = f"Make {target} from the numbers {', '.join(map(str, numbers))}."
        return Question(asked, answer={"numbers": numbers, "target": target})


def correct(rollout: Rollout) -> float:
    """1 if the answer's last <answer> (or, without tags, its last line) is an expression that uses
    each number once and has the target's value, in exact fractions; else 0. A reward."""
    said = answer_text(rollout)
    tagged = _TAGGED.findall(said)
    lines = said.strip().splitlines() or [""]
    text = (tagged[-1] if tagged else lines[-1]).strip()
    text = text.partition("=")[0].strip().replace("\N{MULTIPLICATION SIGN}", "*")
    value, used = evaluate(text.replace("\N{DIVISION SIGN}", "/"))
    answer = rollout.prompt.answer
    return float(value == answer["target"] and used == Counter(answer["numbers"]))


def evaluate(text: str) -> tuple[Fraction | None, Counter[int]]:
    """The value of an expression of whole numbers, + - * / and brackets, and the numbers in it.

    The text is parsed and walked, never run. (None, nothing): it is no such expression.
    """
    try:
        # what is no arithmetic is not parsed: Python would warn of some of it in a run's log
        if len(text) > _LONGEST or not _ARITHMETIC.fullmatch(text):
            return None, Counter()
        used: Counter[int] = Counter()
        return _walk(ast.parse(text, mode="eval").body, used), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None, Counter()


_OPERATORS: dict[type[Any], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def _walk(node: ast.expr, used: Counter[int]) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _walk(node.left, used), _walk(node.right, used)
        return _apply(_OPERATORS[type(node.op)], left, right)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used[node.value] += 1
        return Fraction(node.value)
    raise ValueError("not an expression of numbers")


def _apply(operator: str, a: Fraction, b: Fraction) -> Fraction:
    match operator:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
    return a / b
