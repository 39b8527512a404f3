"""GSM8K: grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from posttrain.config import semantic
from posttrain.data.rows import Problem, RowError, show
from posttrain.tasks.base import Question, Rewards
from posttrain.tasks.files import FileTask, texts

MARK = "####"


class GSM8K(FileTask):
    r"""Rows {"question", "answer"}; the answer ends with `#### 72`. Prompt.answer: "72"."""

    name = "gsm8k"
    rewards: ClassVar[Rewards] = {"correct": {"type": "numeric"}}

    instruction: str = semantic(
        "Think step by step, and end with the final number in \\boxed{}.",
        help="what is said after every question",
    )
    calculator: bool = semantic(False, help="offer the tool `calculator`")

    @property
    def tools(self) -> tuple[str, ...]:
        """The calculator, where it is asked for."""
        return ("calculator",) if self.calculator else ()

    def read(self, row: Mapping[str, Any]) -> Question:
        question, solution = texts(row, "question", "answer")
        _, mark, value = solution.rpartition(MARK)
        value = value.strip().replace(",", "").removeprefix("$")
        try:
            float(value if mark else "")
        except ValueError:
            found = f"ends with {show(solution[-30:])}"
            fix = f"end it with {MARK} and the number"
            raise RowError([Problem("answer", found, fix)]) from None
        return Question(question, value)
