"""Code by its tests: real problems, and code that would rather not be tested."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from posttrain.rewards.code import Code
from posttrain.sandbox import Limits
from tests.namespaces import needs_namespaces
from tests.rewards.rollouts import rollout

pytestmark = needs_namespaces

DOUBLE = {"tests": ["assert double(2) == 4", "assert double(-1) == -2", "assert double(0) == 0"]}


def fenced(code: str) -> str:
    return f"Here it is:\n\n```python\n{code}\n```\nIt doubles."


@pytest.mark.parametrize(
    ("text", "whole", "share"),
    [
        (fenced("def double(x): return 2 * x"), 1.0, 1.0),
        ("def double(x): return 2 * x", 1.0, 1.0),
        (fenced("x = 1") + fenced("def double(x): return x + x"), 1.0, 1.0),
        (fenced("def double(x): return abs(2 * x)"), 0.0, 2 / 3),
        (fenced("def double(x): return 2 *"), 0.0, 0.0),
        (fenced("def triple(x): return 3 * x"), 0.0, 0.0),
        (fenced("import os; os._exit(0)"), 0.0, 0.0),
        (fenced("import sys; sys.exit(0)"), 0.0, 0.0),
        (fenced("import os; os.write(1, b'[1, 1, 1]\\n'); os._exit(0)"), 0.0, 0.0),
        (fenced("def double(x): raise SystemExit(0)"), 0.0, 0.0),
        (fenced("print('[1, 1, 1]')\nimport os; os.write(1, b'[1, 1, 1]\\n')"), 0.0, 0.0),
        (fenced("def double(x):\n  while True: pass"), 0.0, 0.0),
        ("I do not know.", 0.0, 0.0),
    ],
)
def test_statements(text, whole, share):
    limits = Limits(seconds=2.0 if "while" in text else 20.0)
    assert Code(limits=limits)(rollout(text, DOUBLE)) == whole
    if "while" not in text:
        assert Code(limits=limits, partial=True)(rollout(text, DOUBLE)) == pytest.approx(share)


def test_programs_by_what_they_print():
    cases = {"cases": [{"input": "3\n", "output": "6"}, {"input": "-1\n", "output": "-2\n"}]}
    good, half = fenced("print(int(input()) * 2)"), fenced("print(abs(int(input())) * 2)")
    assert Code()(rollout(good, cases)) == 1.0
    assert Code()(rollout(half, cases)) == 0.0
    assert Code(partial=True)(rollout(half, cases)) == 0.5
    assert Code()(rollout(fenced("print(int(input()) * 2); exit(1)"), cases)) == 0.0


def test_what_goes_before_and_prompts_without_tests():
    before = {"before": "import math", "tests": ["assert up(1.2) == 2"]}
    assert Code()(rollout("def up(x): return math.ceil(x)", before)) == 1.0
    assert Code()(rollout("x", "42")) is None
    assert Code(key="code")(rollout("def double(x): return 2 * x", {"code": DOUBLE})) == 1.0
    with pytest.raises(ValueError, match="`tests` must be a list of texts"):
        Code()(rollout("x", {"tests": "assert True"}))
    with pytest.raises(ValueError, match="needs an `entry_point`"):
        Code()(rollout("x", {"test": "def check(f): pass"}))


def test_humaneval(data_dir):
    """The authors' solutions pass, and do not once their last line is another."""
    lines = (data_dir / "data/humaneval/first82.jsonl").read_text().splitlines()[::9]
    rows = [json.loads(line) for line in lines]
    keys = ("test", "entry_point")

    def value(row: dict[str, str], end: str) -> float | None:
        text = row["prompt"] + row["canonical_solution"] + end
        return Code()(rollout(text, {key: row[key] for key in keys}))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda row: value(row, ""), rows)) == [1.0] * len(rows)
    wrong = f"\ndef {rows[0]['entry_point']}(*x): return 'no'\n"
    assert value(rows[0], wrong) == 0.0
