"""The answer as it stands: equal to the right one."""

from __future__ import annotations

import re
from collections import deque
from functools import cache

from posttrain.config import semantic
from posttrain.rewards.answers import last_boxed
from posttrain.rewards.base import Reward, answer_text, expected
from posttrain.rewards.regex import Pattern
from posttrain.types import Rollout

_WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")


class Exact(Reward):
    r"""1 where the answer is the right one, letter by letter; else 0.

    The answer is what `extract` finds; else what the last \boxed{} holds, of \text{...} the words;
    else the whole text.
    Several right answers may be given as a list. None: the prompt has no right answer.
    """

    key: str = semantic("", help="where the answer lies in the prompt's, if that is a mapping")
    extract: Pattern | None = semantic(
        None, help="regular expression of the answer; its last match counts, its first group if any"
    )
    ignore_case: bool = semantic(False, help="Paris is paris")
    ignore_space: bool = semantic(True, help="runs of white space are one blank, none at the ends")

    def __call__(self, rollout: Rollout) -> float | None:
        right = expected(rollout, self.key)
        if right is None:
            return None
        text: str | None = answer_text(rollout)
        if self.extract is not None:
            text = last_match(self.extract, text)
        elif (boxed := last_boxed(text)) is not None:
            worded = _WORDS.fullmatch(boxed)
            text = worded[1] if worded else boxed
        if text is None:
            return 0.0
        accepted = right if isinstance(right, list) else [right]
        return float(self._plain(text) in {self._plain(str(one)) for one in accepted})

    def _plain(self, text: str) -> str:
        text = " ".join(text.split()) if self.ignore_space else text
        return text.casefold() if self.ignore_case else text


def last_match(pattern: str, text: str) -> str | None:
    """What the last match of a regular expression holds: its first group, or all of it."""
    matches = deque(_compiled(pattern).finditer(text), maxlen=1)
    if not matches:
        return None
    found = matches[0]
    return found[1] if found.re.groups else found[0]


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)
