"""Answers labelled good or bad one by one: the columns of a sample to imitate, and {"label": bool}.

TRL's unpaired preference ({"prompt", "completion", "label"}, texts or lists of messages), and
LLaMA-Factory's KTO files ({"messages", "label"}, or ShareGPT's or Alpaca's columns, the label also
as `kto_tag`). The completion is what is judged; of a whole conversation, its last message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats import alpaca, messages, prompt_completion, sharegpt
from posttrain.data.formats.base import Format
from posttrain.data.rows import Problem, RowError, show, wrong_type
from posttrain.types import Conversation, Labelled, Sample

LABELS = ("label", "kto_tag")
_SHAPES = (prompt_completion, messages, sharegpt, alpaca)


def detect(row: Any) -> bool:
    if not isinstance(row, Mapping) or {"chosen", "rejected"} & row.keys():
        return False
    judged = any(row.get(column) is not None for column in LABELS)
    return judged and any(shape.detect(row) for shape in _SHAPES)


def convert(row: Any, cfg: SourceConfig) -> Labelled:
    if not isinstance(row, Mapping):
        raise RowError([wrong_type("row", row, "an object with an answer and a label")])
    column = next((c for c in LABELS if row.get(c) is not None), LABELS[0])
    rest = {key: value for key, value in row.items() if key not in LABELS}
    shape = next((shape for shape in _SHAPES if shape.detect(rest)), prompt_completion)
    problems: list[Problem] = []
    sample: Sample | None = None
    try:
        sample = shape.convert(rest, cfg)
    except RowError as error:
        problems += error.problems
    if not isinstance(row.get(column), bool):
        problems.append(wrong_type(column, row.get(column), "true (desirable) or false"))
    if problems or sample is None:
        raise RowError(problems)
    whole = shape is not prompt_completion
    judged = last_answer(sample) if whole else sample
    if problems := [*_contradiction(row), *lost_weights(judged)]:
        raise RowError(problems)
    return Labelled(judged, row[column])


def _contradiction(row: Mapping[str, Any]) -> list[Problem]:
    """Labels of which one would be lost."""
    first, second = (row.get(column) for column in LABELS)
    if first is None or second is None or first is second:
        return []
    found = f"{show(second)}, where {LABELS[0]} is {show(first)}"
    return [Problem(LABELS[1], found, "remove one of the two")]


def lost_weights(sample: Sample) -> list[Problem]:
    """Weights that would be lost: losses of labelled answers count each trained token once."""
    messages = sample.messages if isinstance(sample, Conversation) else ()
    return [
        Problem(
            "weight",
            f"{show(message['weight'])} in an answer that is judged",
            "write 0 (not trained) or 1, or remove it: its tokens count alike",
        )
        for message in messages
        if message.get("weight") not in (None, 0, 1)
    ]


def last_answer(sample: Sample) -> Sample:
    """The sample with its last message alone to be judged; a text as it is."""
    if not isinstance(sample, Conversation):
        return sample
    *before, answer = sample.messages
    turns = [{**m, "weight": 0.0} if m["role"] == "assistant" else m for m in before]
    return Conversation((*turns, answer), sample.tools, sample.template_kwargs)


FORMAT = Format(detect, convert, kind="labelled")
