"""MATH: competition problems (Hendrycks et al. 2021, arXiv:2103.03874)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from posttrain.config import semantic
from posttrain.data.rows import Problem, RowError, show
from posttrain.rewards.answers import last_boxed
from posttrain.tasks.base import Question, Rewards
from posttrain.tasks.files import FileTask, texts


class MATH(FileTask):
    r"""Rows {"problem", "solution"} and "level" ("Level 3"), "type" ("Algebra") where they are
    chosen by. Prompt.answer: LaTeX, the column "answer" or else what the solution's last \boxed
    holds."""

    name = "math"
    rewards: ClassVar[Rewards] = {"correct": {"type": "math"}}

    instruction: str = semantic(
        "Think step by step, and put the final answer in \\boxed{}.",
        help="what is said after every question",
    )
    levels: tuple[int, ...] = semantic((), help="only problems of these levels, 1 to 5; none = all")
    subjects: tuple[str, ...] = semantic(
        (), help="only problems of these types, as Algebra or Number Theory; none = all"
    )

    def read(self, row: Mapping[str, Any]) -> Question | None:
        problem, solution = texts(row, "problem", "solution")
        if self.levels and _level(row.get("level")) not in self.levels:
            return None
        if self.subjects and texts(row, "type")[0] not in self.subjects:
            return None
        answer = texts(row, "answer")[0] if "answer" in row else last_boxed(solution)
        if answer is None:
            found = f"no \\boxed{{...}} in {show(solution)}"
            raise RowError([Problem("solution", found, "box the answer, or add a column answer")])
        return Question(problem, answer)


def _level(value: Any) -> int:
    """ "Level 3" or 3 -> 3. Rows of unknown level ("Level ?") are 0. RowError: it is neither."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (found := re.fullmatch(r"(?:Level )?(\d|\?)", value.strip())):
        return int(found[1]) if found[1] != "?" else 0
    raise RowError([Problem("level", show(value), 'write "Level 1" to "Level 5"')])
