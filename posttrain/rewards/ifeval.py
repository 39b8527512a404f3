"""Instructions that a program can check, as IFEval gives them with a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config import semantic
from posttrain.rewards.base import Reward, answer_text, expected
from posttrain.rewards.instructions import follows
from posttrain.types import Rollout


class IFEval(Reward):
    """The share of a prompt's instructions that the answer keeps.

    Prompt.answer: {"instruction_id_list": [...], "kwargs": [{...}, ...]}, or what lies at `key`.
    An instruction that cannot be checked is left out (response_language in a language that is not
    known, or of too few words); None: all are, or the prompt has none.
    Source: Zhou et al. 2023 (arXiv:2311.07911), section 2.
    """

    key: str = semantic("", help="where the instructions lie in the prompt's answer")
    all: bool = semantic(False, help="1 where every instruction is kept, else 0")
    loose: bool = semantic(
        False, help="kept, too, without the first or the last line, or the marks * of markdown"
    )

    def __call__(self, rollout: Rollout) -> float | None:
        given = expected(rollout, self.key)
        if given is None:
            return None
        names, arguments = _instructions(given)
        texts = _variants(answer_text(rollout)) if self.loose else [answer_text(rollout)]
        kept = []
        for name, each in zip(names, arguments, strict=True):
            told = [found for text in texts if (found := follows(text, name, each)) is not None]
            if told:
                kept.append(any(told))
        if not kept:
            return None
        return float(all(kept)) if self.all else sum(kept) / len(kept)


def _instructions(given: Any) -> tuple[list[str], list[Mapping[str, Any]]]:
    if isinstance(given, Mapping):
        names, arguments = given.get("instruction_id_list"), given.get("kwargs")
        if isinstance(names, list) and isinstance(arguments, list) and len(names) == len(arguments):
            return names, arguments
    raise ValueError(
        "the prompt's answer must have instruction_id_list and kwargs, lists of one length; "
        f"found {str(given)[:100]}"
    )


def _variants(text: str) -> list[str]:
    """IFEval's loose reading: what often frames an answer is taken off."""
    lines = text.strip().splitlines()
    cut = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = [text, *("\n".join(part).strip() for part in cut)]
    return list(dict.fromkeys([*texts, *(each.replace("*", "") for each in texts)]))
