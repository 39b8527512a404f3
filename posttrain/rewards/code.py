"""Code that passes tests, run in the sandbox."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.config import semantic
from posttrain.rewards import code_trial
from posttrain.rewards.base import Reward, answer_text, expected
from posttrain.sandbox import Limits, run_python
from posttrain.types import Rollout

_BLOCK = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)

_TRIAL = Path(code_trial.__file__).read_text(encoding="utf-8")


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
    Tests run in another process than the code they test, as code_trial.py says, and see of what it
    returns plain values: docs/rewards.md has what that keeps out, and what it does not.
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
            else self._tests(before, code, _tests_of(given))
        )
        return passed / of if self.partial else float(passed == of)

    def _tests(self, before: str, code: str, tests: list[str]) -> tuple[int, int]:
        secret = secrets.token_hex(16)
        work = {"before": before, "code": code, "tests": tests, "partial": self.partial}
        limits = self.limits.model_copy(update={"processes": self.limits.processes + 1})
        ran = run_python(
            _TRIAL, f"{json.dumps(work)}\n{secret}\n", limits, allow_network=self.allow_network
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
