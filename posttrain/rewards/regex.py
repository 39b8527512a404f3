"""A regular expression that the answer must match."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator

from posttrain.config import semantic
from posttrain.rewards.base import Reward, answer_text
from posttrain.types import Rollout


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression of Python's `re`; `.` matches line ends too."""


class Regex(Reward):
    """1 where the pattern matches, else 0."""

    pattern: Pattern = semantic(help="the regular expression; `.` matches line ends too")
    match: Literal["whole", "anywhere"] = semantic(
        "anywhere", help="the whole text, or a part of it"
    )
    of: Literal["answer", "text"] = semantic(
        "answer", help="the answer without its thinking, or the text as it was sampled"
    )
    ignore_case: bool = semantic(False, help="letters match in either case")

    def __call__(self, rollout: Rollout) -> float | None:
        text = answer_text(rollout) if self.of == "answer" else rollout.text
        flags = re.DOTALL | (re.IGNORECASE if self.ignore_case else 0)
        find = re.fullmatch if self.match == "whole" else re.search
        return float(find(self.pattern, text, flags) is not None)
