"""A mathematical answer in LaTeX, equal to the right one as mathematics: 1/2 is 0.5."""

from __future__ import annotations

import importlib.util
from typing import Self

from pydantic import model_validator

from posttrain.config import runtime, semantic
from posttrain.rewards.answers import last_boxed
from posttrain.rewards.base import Reward, answer_text, expected
from posttrain.rewards.math_pool import pool_of
from posttrain.types import Rollout

_TAIL = 2000  # characters of an answer without a box that are looked at


class Math(Reward):
    r"""1 where math-verify (the extra `math`) finds the answer equal to the right one; else 0.

    The answer is what the last \boxed{} holds; else what math-verify finds in the text's end. It
    works in processes of its own: an expression that it cannot finish in time is wrong. None: the
    prompt has no right answer, or it cannot be read.
    """

    key: str = semantic("", help="where the answer lies in the prompt's, if that is a mapping")
    boxed: bool = semantic(False, help="only what is in \\boxed{} is an answer")
    timeout: int = semantic(5, gt=0, help="seconds to read an answer, and again to compare it")
    workers: int = runtime(2, gt=0, help="processes that compare")

    @model_validator(mode="after")
    def _installed(self) -> Self:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("needs math-verify: pip install 'posttrain[math]'")
        return self

    def __call__(self, rollout: Rollout) -> float | None:
        right = expected(rollout, self.key)
        if right is None:
            return None
        text = answer_text(rollout)
        found = last_boxed(text)
        gold = _bare(last_boxed(str(right)) or str(right))
        if found is not None and _bare(found) == gold:
            return 1.0
        if found is None and self.boxed:
            return 0.0
        said = text[-_TAIL:] if found is None else f"\\boxed{{{found}}}"
        return pool_of(self.workers).equal(gold, said, self.timeout)


def _bare(text: str) -> str:
    return text.strip().removeprefix("$").removesuffix("$").strip()
