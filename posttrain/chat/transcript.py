"""A conversation for people to read, on a terminal: who said what, thoughts, calls and results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from posttrain.types import Message

_STYLES = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}


def transcript(prompt: Sequence[Message], answer: Sequence[Message] = ()) -> RenderableType:
    """Both in turn; what the answer holds is marked by a bar. Nothing in a message can steer the
    terminal, and none of it is read as markup."""
    said = [_message(message, "  ") for message in prompt]
    said += [_message(message, "\u2502 ") for message in answer]
    return Group(*said)


def visible(text: str) -> str:
    """Text without control characters (but newline and tab): it cannot steer a terminal. Half a
    pair of surrogates, which no terminal takes, is written as its escape."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def _message(message: Message, bar: str) -> RenderableType:
    role = str(message.get("role", ""))
    name = f" {message['name']}" if message.get("name") else ""
    parts = [Text(visible(role + name), style=f"bold {_STYLES.get(role, '')}".strip())]
    if message.get("reasoning_content"):
        parts.append(Text(visible(message["reasoning_content"]), style="dim italic"))
    if message.get("content"):
        parts.append(Text(visible(str(message["content"]))))
    for call in message.get("tool_calls") or ():
        parts.append(Text(visible(_call(call)), style="bold yellow"))
    lines = [Text(bar, style="dim") + line for part in parts for line in part.split("\n")]
    return Group(*lines, Text())


def _call(call: Mapping[str, Any]) -> str:
    """As Python would write it: name(argument=value)."""
    function = call["function"]
    arguments = function.get("arguments", {})
    if not isinstance(arguments, Mapping):
        return f"{function['name']}({arguments})"
    written = [f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in arguments.items()]
    return f"{function['name']}({', '.join(written)})"
