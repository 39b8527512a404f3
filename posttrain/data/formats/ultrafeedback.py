"""UltraFeedback as its authors give it: {"instruction", "completions": [{"response",
"overall_score", ...}]}. The completion with the best score is chosen, the one with the worst
rejected; of several with one score, the first.

The score is the first of overall_score, fine-grained_score and score that all completions have, as
a number or its text. (Zephyr's and TRL's versions choose by overall_score too, but reject one of
the other three at random. Argilla's goes by the mean of the four aspects, since early copies of the
data had 10 for some of the worst answers: take a copy from 2024 on.) The completions' own system
prompts, which differ, are left out, as in those versions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats.base import Format, Turns, as_object, items_have
from posttrain.data.formats.preference import join, text_answer
from posttrain.data.rows import Problem, RowError, show, text_problem, wrong_type
from posttrain.types import Pair

COLUMNS = ("instruction", "completions")
SCORES = ("overall_score", "fine-grained_score", "score")


def detect(row: Any) -> bool:
    return items_have(row, ("completions",), ("response",)) is not None and "instruction" in row


def convert(row: Any, cfg: SourceConfig) -> Pair:
    row = as_object(row, COLUMNS)
    problems: list[Problem] = []
    if problem := text_problem(row.get("instruction"), "instruction"):
        problems.append(problem)
    completions = row.get("completions")
    if not isinstance(completions, (list, tuple)):
        problems.append(wrong_type("completions", completions, "a list of completions"))
    elif len(completions) < 2:
        found = f"{len(completions)} completion(s): a pair takes two"
        problems.append(Problem("completions", found, "add another, or remove the row"))
    else:
        for i, one in enumerate(completions):
            if not isinstance(one, Mapping):
                wanted = "an object with response and a score"
                problems.append(wrong_type(f"completions[{i}]", one, wanted))
    if problems:
        raise RowError(problems)
    assert completions is not None, "checked above"
    scores = _scores(completions)
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if best == worst:
        found = f"all {len(scores)} have the score {scores[0]:g}"
        raise RowError([Problem("completions", found, "remove the row: none is preferred")])
    chosen, rejected = (
        text_answer(completions[i].get("response"), f"completions[{i}].response", problems)
        for i in (best, worst)
    )
    if problems:
        raise RowError(problems)
    prompt = Turns([{"role": "user", "content": row["instruction"]}], ["instruction"])
    names = ("instruction", chosen.places[0], rejected.places[0])
    return join(prompt, chosen, rejected, {}, names, cfg)


def _scores(completions: Sequence[Mapping[str, Any]]) -> list[float]:
    """One score of each. RowError: there is none that all have, or it is no number."""
    name = next((s for s in SCORES if all(one.get(s) is not None for one in completions)), None)
    if name is None:
        found = f"no score that all of them have ({', '.join(SCORES)})"
        raise RowError([Problem("completions", found, "score each, or remove the row")])
    scores: list[float] = []
    problems: list[Problem] = []
    for i, one in enumerate(completions):
        try:
            scores.append(math.nan if isinstance(one[name], bool) else float(one[name]))
        except (TypeError, ValueError):
            scores.append(math.nan)
        if not math.isfinite(scores[-1]):
            found = f"no number: {show(one[name])}"
            problems.append(Problem(f"completions[{i}].{name}", found, "write the score"))
    if problems:
        raise RowError(problems)
    return scores


FORMAT = Format(detect, convert, kind="pairs")
