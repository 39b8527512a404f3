"""Questions with options, of which one letter is right: AQuA and TruthfulQA."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from posttrain.config import semantic
from posttrain.data.rows import Problem, RowError, show
from posttrain.tasks.base import Question, Rewards
from posttrain.tasks.files import FileTask, texts

LETTER = r"\\boxed\{\W*(?:\\?text\w*\{)?\W*([A-Z])\b"
"""The letter of an answer: \\boxed{B}, \\boxed{(B)}, \\boxed{\\text{B}}, \\boxed{B) 72}."""
_LETTERED = re.compile(r"\s*\(?([A-Z])\s*[).:]\s*(.*)", re.DOTALL)
# options that are about the others must stay where they are
_ABOUT_OTHERS = re.compile(
    r"\b(none|all|both|neither|either|any) of (the|these|them)\b|\babove\b|"
    r"\b[A-E] (and|or) [A-E]\b",
    re.IGNORECASE,
)


class _Choice(FileTask):
    """What tasks with options share. Prompt.answer: the letter."""

    rewards: ClassVar[Rewards] = {"correct": {"type": "exact", "extract": LETTER}}

    instruction: str = semantic(
        "Think step by step, and end with the letter of the right option in \\boxed{}.",
        help="what is said after every question",
    )
    shuffle: bool = semantic(
        True, help="options in an order of their own; those that name others stay where they are"
    )
    seed: int = semantic(0, help="of the order of options")

    def ask(self, question: str, options: Sequence[str], right: int) -> Question:
        """The question with lettered options; `right` is the right one of them as they stand."""
        order = [*range(len(options))]
        if self.shuffle and not any(map(_ABOUT_OTHERS.search, options)):
            random.Random(f"{self.seed} {question}").shuffle(order)
        letters = string.ascii_uppercase
        lines = [f"{letters[i]}) {options[k]}" for i, k in enumerate(order)]
        return Question("\n".join([question.strip(), *lines]), letters[order.index(right)])


class AQuA(_Choice):
    """Rows {"question", "options": ["A)32400", ...], "correct": "A"} (Ling et al. 2017,
    arXiv:1705.04146)."""

    name = "aqua"

    def read(self, row: Mapping[str, Any]) -> Question:
        question, correct = texts(row, "question", "correct")
        options = row.get("options")
        if not isinstance(options, (list, tuple)) or not 2 <= len(options) <= 26:
            fix = 'make it a list of 2 to 26 texts, ["A)first", "B)second"]'
            raise RowError([Problem("options", show(options), fix)])
        found = [_LETTERED.fullmatch(option) for option in map(str, options)]
        letters = [match[1] if match else "" for match in found]
        if letters != [*string.ascii_uppercase[: len(options)]]:
            at = next(i for i, x in enumerate(letters) if x != string.ascii_uppercase[i])
            fix = f'begin it with "{string.ascii_uppercase[at]})"'
            raise RowError([Problem(f"options[{at}]", show(options[at]), fix)])
        if correct.strip() not in letters:
            fix = f"make it one of {', '.join(letters)}"
            raise RowError([Problem("correct", show(correct), fix)])
        said = [match[2].strip() for match in found if match]
        return self.ask(question, said, letters.index(correct.strip()))


class TruthfulQA(_Choice):
    """Rows {"Question", "Best Answer", "Incorrect Answers": "one; two"}: one right option, as the
    paper's MC1 (Lin et al. 2022, arXiv:2109.07958)."""

    name = "truthfulqa"

    def read(self, row: Mapping[str, Any]) -> Question:
        question, best, wrong = texts(row, "Question", "Best Answer", "Incorrect Answers")
        wrong = [text for part in wrong.split(";") if (text := part.strip()) and text != best]
        if not 1 <= len(wrong) <= 25:
            found = f"{len(wrong)} options"
            raise RowError([Problem("Incorrect Answers", found, "write 1 to 25, with ; between")])
        return self.ask(question, [best.strip(), *wrong], 0)
