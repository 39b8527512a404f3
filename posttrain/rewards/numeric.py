"""An answer that is a number."""

from __future__ import annotations

from fractions import Fraction

from posttrain.config import semantic
from posttrain.rewards.answers import final_number, number
from posttrain.rewards.base import Reward, answer_text, expected
from posttrain.rewards.exact import last_match
from posttrain.rewards.regex import Pattern
from posttrain.types import Rollout


class Numeric(Reward):
    r"""1 where the answer's number is the right one, else 0.

    It is looked for in the last \boxed{}, then after the last `####` or "the answer is", then it is
    the last number of all. None: the prompt has no right answer. ValueError: that is no number.
    """

    key: str = semantic("", help="where the answer lies in the prompt's, if that is a mapping")
    extract: Pattern | None = semantic(
        None, help="regular expression of the number; its last match counts, its first group if any"
    )
    tolerance: float = semantic(
        1e-6, ge=0, help="how far off it may be, as a part of the right one"
    )

    def __call__(self, rollout: Rollout) -> float | None:
        right = expected(rollout, self.key)
        if right is None:
            return None
        wanted = number(str(right))
        if wanted is None:
            raise ValueError(f"the right answer is no number: {right!r}")
        text: str | None = answer_text(rollout)
        if self.extract is None:
            found = final_number(text)
        else:
            text = last_match(self.extract, text)
            found = None if text is None else number(text)
        if found is None:
            return 0.0
        return float(abs(found - wanted) <= Fraction(self.tolerance) * abs(wanted))
