"""LLaMA-Factory's pairs. ShareGPT's turns with two answers: {"conversations": [{"from", "value"}],
"chosen": {"from", "value"}, "rejected": {...}} (or role and content, in `messages`); or Alpaca's
columns with two texts: {"instruction", "input"?, "chosen", "rejected", "history"?}. system and
tools may stand beside both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats import alpaca, sharegpt
from posttrain.data.formats.base import Format, Turns, as_object
from posttrain.data.formats.messages import EXTRA
from posttrain.data.formats.preference import join, text_answer
from posttrain.data.rows import SIDES, Problem, RowError, wrong_type
from posttrain.types import Pair


def detect(row: Any) -> bool:
    if not isinstance(row, Mapping):
        return False
    if all(isinstance(row.get(side), str) for side in SIDES):
        return "instruction" in row
    return all(isinstance(row.get(side), Mapping) for side in SIDES) and any(
        isinstance(row.get(column), (list, tuple)) for column in sharegpt.COLUMNS
    )


def convert(row: Any, cfg: SourceConfig) -> Pair:
    if isinstance(row, Mapping) and "instruction" in row:
        return _alpaca(row, cfg)
    row = as_object(row, (*sharegpt.COLUMNS, *SIDES, *EXTRA))
    column = next((c for c in sharegpt.COLUMNS if row.get(c) is not None), sharegpt.COLUMNS[0])
    problems: list[Problem] = []
    turns = row.get(column)
    if not isinstance(turns, (list, tuple)):
        problems.append(wrong_type(column, turns, "a list of turns with from and value"))
        turns = []
    given = [Turns.of(turns, column), *(Turns([row.get(side)], [side]) for side in SIDES)]
    prompt, chosen, rejected = (_messages(part, problems) for part in given)
    if problems:
        raise RowError(problems)
    return join(prompt, chosen, rejected, row, (column, *SIDES), cfg)


def _messages(turns: Turns, problems: list[Problem]) -> Turns:
    """Turns in ShareGPT's keys, or in OpenAI's already."""
    if all(isinstance(turn, Mapping) and "role" in turn for turn in turns.messages):
        return turns
    return sharegpt.to_messages(turns, problems)


def _alpaca(row: Any, cfg: SourceConfig) -> Pair:
    row = as_object(row, (*alpaca.COLUMNS, *SIDES, "tools"))
    problems: list[Problem] = []
    prompt = alpaca.prompt(row, problems)
    chosen, rejected = (text_answer(row.get(side), side, problems) for side in SIDES)
    if problems:
        raise RowError(problems)
    beside = {"tools": row.get("tools")}  # the system text is in the prompt
    return join(prompt, chosen, rejected, beside, ("instruction", *SIDES), cfg)


FORMAT = Format(detect, convert, kind="pairs")
