"""Final answers: numbers, and mathematics."""

from __future__ import annotations

import importlib.util
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from pydantic import ValidationError

from posttrain.rewards import math_worker
from posttrain.rewards.answers import final_number, last_boxed, number
from posttrain.rewards.math import Math
from posttrain.rewards.math_pool import Pool, pool_of
from posttrain.rewards.numeric import Numeric
from posttrain.rewards.think import Think
from tests.rewards.rollouts import rollout


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-7", -7),
        ("\N{MINUS SIGN}7", -7),
        ("$1,234.50", Fraction("1234.5")),
        ("-$5", -5),
        ("$-5", -5),
        ("3/4 cup", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"\dfrac{-3}{4}", Fraction(-3, 4)),
        ("1{,}000", 1000),
        ("1.5e3", 1500),
        ("50%", 50),
        ("12 km", 12),
        ("10 and 12", None),
        ("x", None),
        ("1/0", None),
        ("1" * 5000, None),
        ("1e999999999", None),
    ],
)
def test_a_number_in_a_short_text(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12 + 30 = 42.", 42),
        ("She has 3 and he has 4, so the answer is 7, not 8.", 7),
        ("It was 9.\n#### 1,200", 1200),
        (r"first \boxed{3}, no: \boxed{4}. That is 5 times less.", 4),
        (r"\boxed{} 5", None),
        ("10-4", 4),
        ("costs $-3", -3),
        ("In total 18.", 18),
        ("v1.2.3", None),
        ("no number", None),
    ],
)
def test_the_number_a_text_comes_to(text, value):
    assert final_number(text) == value


def test_boxes_within_braces():
    assert last_boxed(r"\boxed{\frac{1}{2}} or \boxed{x_{1}") == r"\frac{1}{2}"
    assert last_boxed(r"\fbox {a}") == "a"
    assert last_boxed("none") is None


def test_numeric():
    assert Numeric()(rollout("so 72 clips", "72")) == 1.0
    assert Numeric()(rollout("so 72 clips", 72.0)) == 1.0
    assert Numeric()(rollout("so 71", "72")) == 0.0
    assert Numeric()(rollout("so none", "72")) == 0.0
    assert Numeric()(rollout("0.3333333333", "1/3")) == 1.0
    assert Numeric(tolerance=0)(rollout("0.3333333333", "1/3")) == 0.0
    assert Numeric(tolerance=0.1)(rollout("66", "72")) == 1.0
    assert Numeric(extract=r"x = (\S+)")(rollout("x = 4, y = 5", 4)) == 1.0
    assert Numeric(key="n")(rollout("4", {"n": 4})) == 1.0
    assert Numeric()(rollout("4")) is None
    with pytest.raises(ValueError, match="no number: 'four'"):
        Numeric()(rollout("4", "four"))


def test_answers_of_gsm8k_are_numbers(data_dir):
    """Its own solutions are right by this reward, and each is wrong for the next problem."""
    lines = (data_dir / "data/gsm8k/test_first500.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    values = [text.rpartition("####")[2].strip() for text in solutions]
    right = [Numeric()(rollout(s, v)) for s, v in zip(solutions, values, strict=True)]
    assert right == [1.0] * len(right)
    for solution, value in zip(solutions[:-1], values[1:], strict=True):
        same = solution.endswith(f"#### {value}")
        assert Numeric()(rollout(solution, value)) == float(same)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>hm</think>4", 1.0),
        ("  <think>\nhm\n</think>\n4", 1.0),
        ("hm</think>4", 0.0),
        ("<think>hm", 0.0),
        ("<think>hm</think>", 0.0),
        ("<think></think>4", 0.0),
        ("so <think>hm</think>4", 0.0),
        ("<think>a<think>b</think>4", 0.0),
        ("<think>a</think>4</think>", 0.0),
        ("<think>a</think>4<think>b</think>", 0.0),
    ],
)
def test_think(text, value):
    assert Think()(rollout(text)) == value


def test_think_that_the_template_opened_and_answers_in_tags():
    assert Think(opened=True)(rollout("hm</think>4")) == 1.0
    assert Think(opened=True)(rollout("<think>hm</think>4")) == 1.0
    tags = Think(answer=("<answer>", "</answer>"))
    assert tags(rollout("<think>hm</think> <answer>4</answer>")) == 1.0
    assert tags(rollout("<think>hm</think> 4")) == 0.0
    assert tags(rollout("<think>hm</think> <answer></answer>")) == 0.0
    assert tags(rollout("<think>a</think><answer>4</answer><answer>5</answer>")) == 0.0


CASES = [
    (r"so \boxed{0.5}", r"\frac{1}{2}", 1.0),
    (r"so \boxed{\frac{2}{4}}", r"\frac{1}{2}", 1.0),
    (r"so \boxed{\frac{1}{3}}", r"\frac{1}{2}", 0.0),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
    (r"\boxed{2\sqrt2}", r"$\sqrt{8}$", 1.0),
    (r"\boxed{(3, 4)}", "(3,4)", 1.0),
    (r"\boxed{1} or \boxed{2} or \boxed{3}", "2", 0.0),
    ("the answer is $7$", "7", 1.0),
    ("no idea", "7", 0.0),
    (r"\boxed{9^{9^{9^{9}}}}", "7", 0.0),
    (r"\boxed{\text{even}}", r"\text{even}", 1.0),
]


@pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="the extra math")
def test_math_in_threads():
    part = Math(timeout=2, workers=1)
    with ThreadPoolExecutor(4) as pool:
        got = pool.map(lambda case: part(rollout(case[0], case[1])), CASES)
    assert list(got) == [value for *_, value in CASES]
    assert part(rollout("4")) is None
    assert Math(boxed=True, workers=1)(rollout("it is $4$", "4")) == 0.0


@pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="the extra math")
def test_answers_of_math_are_their_own_and_no_other_s(data_dir):
    lines = (data_dir / "data/math/math_test_minus_math500.jsonl").read_text().splitlines()[::75]
    golds = [last_boxed(json.loads(line)["solution"]) or "" for line in lines]
    pool = pool_of(1)
    for gold, other in itertools.pairwise(golds):
        assert pool.equal(gold, f"\\boxed{{{gold}}}", 5) == 1.0, gold
        assert pool.equal(gold, f"\\boxed{{{other}}}", 5) == float(gold == other), (gold, other)


def test_math_without_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"pip install 'posttrain\[math\]'"):
        Math()


def _script(tmp_path, monkeypatch: pytest.MonkeyPatch, text: str) -> Pool:
    path = tmp_path / "worker.py"
    path.write_text(text)
    monkeypatch.setattr(math_worker, "__file__", str(path))
    monkeypatch.setattr("posttrain.rewards.math_pool._GRACE", 0.1)
    return Pool(1)


def test_a_worker_that_ends_or_hangs_makes_the_answer_wrong(tmp_path, monkeypatch):
    ready = "print('ready', flush=True)\nimport sys, time\nfor line in sys.stdin:\n"
    text = ready + "  if 'hang' in line: time.sleep(60)\n  if 'die' in line: sys.exit(1)\n"
    pool = _script(tmp_path, monkeypatch, text + "  print(int('yes' in line), flush=True)\n")
    began = time.monotonic()
    assert [pool.equal("x", word, 0) for word in ("yes", "hang", "yes", "die", "no", "yes")] == [
        *(1.0, 0.0, 1.0),
        *(0.0, 0.0, 1.0),
    ]
    assert time.monotonic() - began < 50
    pool.close()


def test_a_worker_that_does_not_load(tmp_path, monkeypatch):
    pool = _script(tmp_path, monkeypatch, "raise ImportError('no such thing')")
    with pytest.raises(RuntimeError, match=r"(?s)could not be loaded: .*no such thing"):
        pool.equal("x", "x", 1)
