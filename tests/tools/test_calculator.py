"""The calculator: right values, and no expression that can do anything but arithmetic."""

from __future__ import annotations

import random

import pytest

from posttrain.tools.base import ToolError
from posttrain.tools.calculator import calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2*3", "7"),
        ("(1 + 2)*3", "9"),
        ("0.1 + 0.2", "0.3"),
        ("10/4", "2.5"),
        ("1/3", "0.333333333333"),
        ("7 // 2", "3"),
        ("-7 % 3", "2"),
        ("2**10", "1024"),
        ("2^10", "1024"),
        ("2**-2", "0.25"),
        ("2**0.5", "1.41421356237"),
        ("3 \u00d7 4 \u00f7 6 \u2212 1", "1"),
        ("sqrt(2.25)", "1.5"),
        ("round(2/3, 2)", "0.67"),
        ("max(1, 5, 3) - min(4, 2) + abs(-3)", "6"),
        ("floor(2.7) + ceil(2.1)", "5"),
        ("log(exp(2))", "2"),
        ("12_000 + 1e3", "13000"),
        ("123456789 * 987654321", "121932631112635269"),
    ],
)
def test_values(expression: str, value: str):
    assert calculate(expression) == value


def test_values_are_those_of_python():
    rng = random.Random(0)
    for _ in range(200):
        parts = [str(rng.randint(1, 99))]
        for _ in range(rng.randint(1, 6)):
            parts += [rng.choice("+-*"), str(rng.randint(1, 99))]
        expression = " ".join(parts)
        assert calculate(expression) == str(eval(expression)), expression


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("__import__('os').system('true')", "no arithmetic"),
        ("open('x')", "there is no function 'open'; there are: abs"),
        ("(1).bit_length", "no arithmetic"),
        ("[1][0]", "no arithmetic"),
        ("'a' * 3", "no arithmetic"),
        ("True + 1", "no arithmetic"),
        ("1 if 2 else 3", "no arithmetic"),
        ("x + 1", "no arithmetic"),
        ("1 +", "is no arithmetic expression"),
        ("", "is no arithmetic expression"),
        ("1\x00", "is no arithmetic expression"),
        ("(" * 500, "is no arithmetic expression"),
        ("1" * 2000, "more than 1000 characters"),
        ("1/0", "division by zero"),
        ("0**-1", "division by zero"),
        ("9**9**9**9", "too large"),
        ("2**0.5**-99", "too large"),
        ("exp(1e6)", "too large"),
        ("1e400", "is no arithmetic expression"),
        ("sqrt(-1)", "no real value"),
        ("(-8)**(1/3)", "no real value"),
        ("min()", "does not take 0 arguments"),
        ("round(1.5, 1000)", "whole number of digits"),
        ("min(1, key=abs)", "no arithmetic"),
    ],
)
def test_what_is_refused(expression: str, reason: str):
    with pytest.raises(ToolError, match=reason):
        calculate(expression)
