"""ShareGPT: {"conversations": [{"from", "value"}], "system"?, "tools"?}, with tool turns.

A `function_call` is the assistant's, its value the JSON of one call or of a list of calls;
`observation` (or tool, function_response) is the result. A gpt turn right before a function_call
and the call are one assistant message: what it says, then what it calls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats.base import Format, Turns, as_object, items_have
from posttrain.data.formats.messages import EXTRA, conversation
from posttrain.data.normal import did_you_mean
from posttrain.data.rows import Problem, RowError, show, wrong_type
from posttrain.types import Conversation

COLUMNS = ("conversations", "conversation", "messages")
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


def detect(row: Any) -> bool:
    return items_have(row, COLUMNS, ("from", "value")) is not None


def convert(row: Any, cfg: SourceConfig) -> Conversation:
    row = as_object(row, (*COLUMNS, *EXTRA))
    column = next((c for c in COLUMNS if row.get(c) is not None), COLUMNS[0])
    turns = row.get(column)
    if not isinstance(turns, (list, tuple)):
        raise RowError([wrong_type(column, turns, "a list of turns with from and value")])
    problems: list[Problem] = []
    made = to_messages(Turns.of(turns, column), problems)
    if problems:
        raise RowError(problems)
    return conversation(made.messages, row, column, cfg, list(made.places))


def to_messages(turns: Turns, problems: list[Problem]) -> Turns:
    """The turns as messages with a role and content; what is wrong goes to `problems`."""
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    for turn, at in zip(turns.messages, turns.places, strict=True):
        if not isinstance(turn, Mapping):
            problems.append(wrong_type(at, turn, "an object with from and value"))
            continue
        _add(messages, turn, at, problems)
        places += [at] * (len(messages) - len(places))
    return Turns(messages, places)


def _add(
    messages: list[dict[str, Any]], turn: Mapping[str, Any], at: str, problems: list[Problem]
) -> None:
    speaker = turn.get("from")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        meant = did_you_mean(str(speaker), ROLES)
        fix = f"did you mean {meant}?" if meant else f"use one of {', '.join(ROLES)}"
        problems.append(Problem(f"{at}.from", f"unknown role {show(speaker)}", fix))
        return
    rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
    if role != "function_call":
        messages.append({"role": role, "content": turn.get("value"), **rest})
        return
    calls = _calls(turn.get("value"), f"{at}.value", problems)
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and "tool_calls" not in last:
        last.update(tool_calls=calls, **rest)
    else:
        messages.append({"role": "assistant", "tool_calls": calls, **rest})


def _calls(value: Any, at: str, problems: list[Problem]) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            found = f"no JSON ({error}): {show(value)}"
            problems.append(Problem(at, found, 'write {"name": ..., "arguments": {...}}'))
            return []
    calls = list(value) if isinstance(value, (list, tuple)) else [value]
    if not calls:
        problems.append(Problem(at, "an empty list of calls", "write the call, or remove the turn"))
    return calls


FORMAT = Format(detect, convert)
