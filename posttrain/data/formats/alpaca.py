"""Alpaca: {"instruction", "input"?, "output", "system"?, "history"?: [[user, assistant], ...]}.

The user's turn is the instruction, with the input on the next line where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats.base import Format, Turns, as_object
from posttrain.data.rows import Problem, RowError, text_problem, wrong_type
from posttrain.types import Conversation

COLUMNS = ("instruction", "input", "output", "system", "history")


def detect(row: Any) -> bool:
    return isinstance(row, Mapping) and "instruction" in row and "output" in row


def convert(row: Any, cfg: SourceConfig) -> Conversation:
    row = as_object(row, COLUMNS)
    problems: list[Problem] = []
    messages = list(prompt(row, problems).messages)
    if problem := text_problem(row.get("output"), "output"):
        problems.append(problem)
    if problems:
        raise RowError(problems)
    return Conversation((*messages, {"role": "assistant", "content": row["output"]}))


def prompt(row: Mapping[str, Any], problems: list[Problem]) -> Turns:
    """All but the answer; what is wrong goes to `problems`."""
    messages: list[dict[str, Any]] = []
    places: list[str] = []

    def add(role: str, text: Any, field: str) -> None:
        if problem := text_problem(text, field):
            problems.append(problem)
        messages.append({"role": role, "content": text})
        places.append(field)

    if row.get("system") not in (None, ""):
        add("system", row["system"], "system")
    history = row.get("history") or ()
    if not isinstance(history, (list, tuple)):
        problems.append(wrong_type("history", history, "a list of [user, assistant] pairs"))
        history = ()
    for i, pair in enumerate(history):
        if isinstance(pair, (list, tuple)) and len(pair) == 2:
            add("user", pair[0], f"history[{i}][0]")
            add("assistant", pair[1], f"history[{i}][1]")
        else:
            problems.append(wrong_type(f"history[{i}]", pair, "a pair [user, assistant]"))
    add("user", row.get("instruction"), "instruction")
    if row.get("input") not in (None, ""):
        if problem := text_problem(row["input"], "input", may_be_empty=True):
            problems.append(problem)
        elif isinstance(row.get("instruction"), str):
            messages[-1]["content"] = f"{row['instruction']}\n{row['input']}"
    return Turns(messages, places)


FORMAT = Format(detect, convert)
