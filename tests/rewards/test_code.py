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


EQUAL = """
class Any(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
    __sub__ = __rsub__ = __abs__ = lambda self, *_: 0
"""
READ = """
import os, sys
def double(x):
    os.lseek(0, 0, 0)
    text = os.read(0, 9999).decode() + sys.stdin.read() + (sys.__stdin__.read() or "")
    os.write(1, f"{text.splitlines()[-1]}[1, 1, 1]\\n".encode())
    os._exit(0)
"""
FRAMES = """
import gc, sys
def all_passed():
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if type(value) is list: value[:] = [1, 1, 1]
        frame = frame.f_back
    for value in gc.get_objects():
        if type(value) is dict and "tests" in value: value["tests"] = []
def double(x): all_passed()
all_passed()
"""
FORGED = """
import os
for fd in range(64):
    try: os.write(fd, b'["0", "", null]\\n["0", "", [["list", [4]], [], {}]]\\n')
    except OSError: pass
def double(x): pass
"""
ABOVE = """
import ctypes, os
libc = ctypes.CDLL(None)
class Piece(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("size", ctypes.c_size_t)]
def looked():
    data = ctypes.create_string_buffer(8)
    here = Piece(ctypes.addressof(data), 8)
    there = Piece(id(None), 8)
    read = libc.process_vm_readv(os.getppid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    return read, libc.ptrace(16, os.getppid(), 0, 0)
"""


@pytest.mark.parametrize(
    "code",
    [
        EQUAL + "def double(x): return Any()",
        EQUAL.replace("(int)", "").replace("int.", "object.") + "def double(x): return Any()",
        READ,
        FRAMES,
        FORGED,
        "import builtins\nbuiltins.exec = builtins.compile = lambda *_, **__: None",
        "import builtins\nbuiltins.AssertionError = type('A', (Warning,), {})\ndef double(x): 1/0",
        "def abs(x): return 0\ndef double(x): return 0",
        "class math:\n  isclose = lambda *_: True\ndef double(x): return 0",
        "import math\nmath.isclose = lambda *_: True\ndef double(x): return 0",
        "import sys\ndef double(x): sys.settrace(None); raise AssertionError",
    ],
    ids=lambda code: code.strip()[:24],
)
def test_what_would_pass_without_doubling(code):
    """Objects that equal all, a look at the tests, the runner's own lists, answers given before
    they are asked for, builtins and modules of one's own: no test of three passes."""
    tests = ["assert double(2) == 4", "assert abs(double(3) - 6) < 1e-6"]
    tests += ["assert math.isclose(double(5), 10)"]
    assert Code(partial=True)(rollout(fenced(code), {"tests": tests})) == 0.0
    good = fenced("import math\ndef double(x): return 2 * x")
    assert Code()(rollout(good, {"tests": tests})) == 1.0


def test_the_judge_cannot_be_looked_into():
    """Both processes are one user's; as a rule a process may read a neighbour's memory."""
    tests = {"tests": ["assert looked() == (-1, -1)"]}
    assert Code()(rollout(fenced(ABOVE), tests)) == 1.0


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("def sum(a, b): return a * b", ["assert sum(3, 4) == 12"]),
        ("def f(x): return -x", ["def check(f):\n  assert f(1) == -1\ncheck(f)"]),
        (
            "def put(rows, *, last): rows.append(last)",
            ["r = [1]; put(r, last=2)", "assert r == [1, 2]"],
        ),
        (
            "class Node:\n  def __init__(self, v, n=None): self.v, self.n = v, n\n"
            "  def __eq__(self, o): return self.v == o.v and self.n == o.n\n"
            "  def __add__(self, o): return Node(self.v + o.v)\n"
            "  def __iter__(self):\n    yield self.v\n    yield from self.n or ()\n"
            "def flip(n, after=None): return flip(n.n, Node(n.v, after)) if n else after",
            [
                "assert list(flip(Node(1, Node(2)))) == [2, 1]",
                "assert flip(Node(1, Node(2))) == Node(2, Node(1))",
                "n = Node(1) + Node(2); assert n.v == 3; n.v = 4; assert n.v == 4",
                "assert Node(1) != Node(2) and not flip(None)",
            ],
        ),
        (
            "def share(a, b):\n  if not b: raise ValueError('none')\n  return a / b",
            [
                "try:\n  share(1, 0)\n  assert False\n"
                "except ValueError as error:\n  assert error.args == ('none',)"
            ],
        ),
        ("def each(f, xs): return [f(x) for x in xs]", ["assert each(lambda x: -x, [1]) == [-1]"]),
        (
            "from collections import Counter, namedtuple\nP = namedtuple('P', 'x y')\n"
            "from fractions import Fraction\nimport math\n"
            "def all(s): return Counter(s), P(1, 2), Fraction(1, 2), {b'a': {3}}, math.inf, 2j",
            [
                "from fractions import Fraction as F",
                "assert all('aa') == ({'a': 2}, (1, 2), F('0.5'), {b'a': {3}}, float('inf'), 2j)",
            ],
        ),
        (
            "def odd(xs):\n  for x in xs:\n    if x % 2: yield x",
            ["assert list(odd(range(5))) == [1, 3]"],
        ),
    ],
    ids=[
        "own sum",
        "checked",
        "in place",
        "classes",
        "errors",
        "functions",
        "values",
        "generators",
    ],
)
def test_what_tests_may_ask_of_an_answer(code, tests):
    assert Code()(rollout(fenced(code), {"tests": tests})) == 1.0
    wrong = [*tests, "assert False"]
    assert Code(partial=True)(rollout(fenced(code), {"tests": wrong})) == pytest.approx(
        len(tests) / len(wrong)
    )


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
