"""SVAMP and MAWPS: one-step word problems, whose answers are numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from posttrain.config import semantic
from posttrain.data.rows import Problem, RowError, show
from posttrain.tasks.base import Question, Rewards
from posttrain.tasks.files import FileTask, texts


class SVAMP(FileTask):
    """Rows {"Body", "Question", "Answer"} (Patel et al. 2021, arXiv:2103.07191).

    Prompt.answer: the number as a text, "145".
    """

    name = "svamp"
    rewards: ClassVar[Rewards] = {"correct": {"type": "numeric"}}

    instruction: str = semantic(
        "End with the final number in \\boxed{}.", help="what is said after every question"
    )
    calculator: bool = semantic(False, help="offer the tool `calculator`")

    @property
    def tools(self) -> tuple[str, ...]:
        """The calculator, where it is asked for."""
        return ("calculator",) if self.calculator else ()

    def read(self, row: Mapping[str, Any]) -> Question:
        body, question = (text.strip() for text in texts(row, "Body", "Question"))
        body += "" if body[-1] in ".?!" else "."
        return Question(f"{body} {question}", number(row, "Answer"))


class MAWPS(SVAMP):
    """Rows {"sQuestion", "lSolutions"} as its authors have it (Koncel-Kedziorski et al. 2016,
    NAACL), or {"input", "target"}."""

    name = "mawps"

    def read(self, row: Mapping[str, Any]) -> Question:
        if "sQuestion" not in row and "input" in row:
            return Question(texts(row, "input")[0].strip(), number(row, "target"))
        (question,) = texts(row, "sQuestion")
        solutions = row.get("lSolutions")
        if not isinstance(solutions, (list, tuple)) or len(solutions) != 1:
            found = show(solutions)
            raise RowError([Problem("lSolutions", found, "make it a list of one number")])
        return Question(question.strip(), number({"lSolutions": solutions[0]}, "lSolutions"))


def number(row: Mapping[str, Any], name: str) -> str:
    """The column as a text, whole numbers without a point. RowError: it is no number."""
    value = row.get(name)
    try:
        if isinstance(value, bool) or not math.isfinite(real := float(value)):  # pyright: ignore[reportArgumentType]
            raise ValueError
    except (TypeError, ValueError):
        raise RowError([Problem(name, f"no number: {show(value)}", "write a number")]) from None
    if isinstance(value, int):
        return str(value)
    return str(int(real)) if real == int(real) else repr(real)
