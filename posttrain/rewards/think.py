"""The form of an answer: first its thinking, in tags, then what it says."""

from __future__ import annotations

import re

from posttrain.config import semantic
from posttrain.rewards.base import Reward
from posttrain.types import Rollout


class Think(Reward):
    """1 where the text is `<think>something</think>something`, each tag once; else 0."""

    open: str = semantic("<think>", min_length=1, help="the tag that begins the thinking")
    close: str = semantic("</think>", min_length=1, help="the tag that ends it")
    opened: bool = semantic(False, help="the chat template has opened it: the text begins inside")
    answer: tuple[str, str] | None = semantic(
        None, help="tags that what follows must stand in, as [<answer>, </answer>]"
    )

    def __call__(self, rollout: Rollout) -> float | None:
        text = rollout.text.strip()
        head = re.escape(self.open)
        if self.opened:
            head = f"(?:{head})?"
        form = re.fullmatch(f"{head}(.*?){re.escape(self.close)}(.*)", text, re.DOTALL)
        if form is None:
            return 0.0
        thought, said = form[1].strip(), form[2].strip()
        if self.answer is not None:
            first, last = self.answer
            if not (said.startswith(first) and said.endswith(last)):
                return 0.0
            said = said.removeprefix(first).removesuffix(last)
            if first in said or last in said:
                return 0.0
        again = any(tag in part for tag in (self.open, self.close) for part in (thought, said))
        return float(bool(thought) and bool(said.strip()) and not again)
