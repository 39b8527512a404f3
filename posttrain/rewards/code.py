"""Code that passes tests, run in the sandbox."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from posttrain.config import semantic
from posttrain.rewards.base import Reward, answer_text, expected
from posttrain.sandbox import Limits, run_python
from posttrain.types import Rollout

_BLOCK = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)

# Runs in the sandbox. What is told at the end opens with a secret that is read from the input only
# then: a program that leaves early, or prints what it likes, has passed nothing.
_HARNESS = """
def _run():
    import io, json, os, sys
    source, sys.stdin = sys.stdin, io.StringIO()
    given = json.loads(source.readline())
    out, passed = os.dup(1), []
    sys.stdout = io.StringIO()
    space = {"__name__": "solution", "__builtins__": __builtins__}
    try:
        for part in given["before"]:
            exec(compile(part, "solution.py", "exec"), space)
        for test in given["tests"]:
            try:
                exec(compile(test, "test.py", "exec"), space)
                passed.append(1)
            except BaseException:
                passed.append(0)
                if not given["partial"]:
                    break
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr)
    os.write(out, (source.readline().strip() + json.dumps(passed) + "\\n").encode())


_run()
"""


class Code(Reward):
    """1 where the answer's code passes all tests, else 0.

    The code is the last fenced block of Python, or all of the answer. The prompt's answer (or what
    lies at `key`) is a mapping with
      tests        statements, one text per test, run after the code in one process; or
      test         a text that defines check(candidate), and entry_point: what it is called with
                   (HumanEval); or
      cases        [{"input": ..., "output": ...}, ...]: standard input and output of a program of
                   its own, compared word by word
      before       code that goes before the answer's (optional)
    None: it has none of them. SandboxError where programs cannot be isolated.
    The tests run in the interpreter of the code they test, which could cheat them on purpose, as by
    an object that equals everything; cases cannot be cheated so.
    """

    key: str = semantic("", help="where the tests lie in the prompt's answer")
    partial: bool = semantic(False, help="the share of tests that pass")
    limits: Limits = semantic(Limits(), help="what one program may use: all tests, or one case")
    allow_network: bool = semantic(
        False, help="run where the network cannot be cut off, too, and let programs use it"
    )

    def __call__(self, rollout: Rollout) -> float | None:
        given = expected(rollout, self.key)
        if not isinstance(given, Mapping) or not given.keys() & {"tests", "test", "cases"}:
            return None
        blocks = _BLOCK.findall(answer_text(rollout))
        code = blocks[-1] if blocks else answer_text(rollout)
        before = str(given.get("before", ""))
        passed, of = (
            self._cases(f"{before}\n{code}", given["cases"])
            if "cases" in given
            else self._tests([before, code], _tests_of(given))
        )
        return passed / of if self.partial else float(passed == of)

    def _tests(self, before: list[str], tests: list[str]) -> tuple[int, int]:
        secret = secrets.token_hex(16)
        work = json.dumps({"before": before, "tests": tests, "partial": self.partial})
        ran = run_python(
            _HARNESS, f"{work}\n{secret}\n", self.limits, allow_network=self.allow_network
        )
        told = [line for line in ran.stdout.splitlines() if line.startswith(secret)]
        passed = json.loads(told[-1].removeprefix(secret)) if told else []
        return sum(passed), len(tests)

    def _cases(self, code: str, cases: list[Mapping[str, Any]]) -> tuple[int, int]:
        passed = 0
        for case in cases:
            ran = run_python(
                code, str(case["input"]), self.limits, allow_network=self.allow_network
            )
            right = ran.ok and ran.stdout.split() == str(case["output"]).split()
            passed += right
            if not right and not self.partial:
                break
        return passed, len(cases)


def _tests_of(given: Mapping[str, Any]) -> list[str]:
    if "tests" in given:
        tests = given["tests"]
        if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
            return tests
        raise ValueError(f"`tests` must be a list of texts; found {str(tests)[:100]}")
    if not isinstance(given.get("entry_point"), str):
        raise ValueError("`test` needs an `entry_point`: the name that check() is called with")
    return [f"{given['test']}\ncheck({given['entry_point']})"]
