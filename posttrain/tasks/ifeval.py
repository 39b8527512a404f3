"""IFEval: instructions whose keeping a program can check (Zhou et al. 2023, arXiv:2311.07911)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from posttrain.data.rows import Problem, RowError, show
from posttrain.tasks.base import Question, Rewards
from posttrain.tasks.files import FileTask, texts


class IFEval(FileTask):
    """Rows {"prompt", "instruction_id_list": [...], "kwargs": [{...}, ...]}.

    Prompt.answer: {"instruction_id_list": [...], "kwargs": [...]}, without arguments that are null.
    """

    name = "ifeval"
    rewards: ClassVar[Rewards] = {"followed": {"type": "ifeval"}}
    right: ClassVar[str] = "followed"

    def read(self, row: Mapping[str, Any]) -> Question:
        (prompt,) = texts(row, "prompt")
        names, arguments = row.get("instruction_id_list"), row.get("kwargs")
        problems = []
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            fix = 'make it a list of names, as "punctuation:no_comma"'
            problems.append(Problem("instruction_id_list", show(names), fix))
        elif not isinstance(arguments, list) or len(arguments) != len(names):
            fix = f"make it a list of {len(names)} objects, one for each instruction"
            problems.append(Problem("kwargs", show(arguments), fix))
        elif wrong := [a for a in arguments if not isinstance(a, Mapping)]:
            problems.append(Problem("kwargs", show(wrong[0]), "make each of them an object"))
        if problems:
            raise RowError(problems)
        assert isinstance(arguments, list), "checked above"
        given = [{k: v for k, v in each.items() if v is not None} for each in arguments]
        return Question(prompt, {"instruction_id_list": names, "kwargs": given})
