"""The shapes a conversation can be handed to a template in, and what a template dropped of it.

Templates differ: content as a string or as a list of parts, tool arguments as a dict or as JSON
text. The first shape in which the template drops nothing is taken. A field that no shape brings
into the text is an error, not a shrug.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.chat.trace import Record, Trace
from posttrain.chat.traced import FIELD, NOBODY, Tag, Traced

_REASONING = ("reasoning_content", "thinking", "reasoning")
_THINK_TAGS = re.compile(r"</?think(?:ing)?>|\[/?THINK\]")


@dataclass(frozen=True)
class Shape:
    """parts: content as [{"type": "text", "text": ...}]; json_arguments: tool arguments as text."""

    parts: bool
    json_arguments: bool


@dataclass(frozen=True)
class Lost:
    """A field that is not in the rendered text. message: its index, NOBODY for the tools."""

    message: int
    field: str


_WITHOUT_CALLS = (Shape(False, False), Shape(True, False))
_WITH_CALLS = (Shape(False, False), Shape(False, True), Shape(True, False), Shape(True, True))


def shapes_for(messages: Sequence[Mapping[str, Any]]) -> Sequence[Shape]:
    """The shapes worth trying, in a fixed order: the same conversation gets the same text."""
    calls = any(message.get("tool_calls") for message in messages)
    return _WITH_CALLS if calls else _WITHOUT_CALLS


def shape_messages(messages: Sequence[Mapping[str, Any]], shape: Shape) -> list[dict[str, Any]]:
    """Plain dicts for the template, reasoning under each name that templates read (as
    transformers does), without `weight`, which is about the loss."""
    return [_shaped(message, shape) for message in messages]


def _shaped(message: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    out = dict(message)
    out.pop("weight", None)
    reasoning = next((out[key] for key in _REASONING if out.get(key) is not None), None)
    if reasoning is not None:
        out = {"thinking": reasoning, **out, "reasoning_content": reasoning}
    if shape.parts and isinstance(out.get("content"), str):
        out["content"] = [{"type": "text", "text": out["content"]}]
    if shape.json_arguments and out.get("tool_calls"):
        out["tool_calls"] = [_json_call(call) for call in out["tool_calls"]]
    return out


def _json_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {**call, "function": function}


def lost_fields(trace: Trace, messages: Sequence[Any], tools: Any) -> list[Lost]:
    """The fields of wrapped messages and tools that the text does not hold.

    White space at the ends and thinking tags may go; no other character may.
    """
    shown: dict[Tag, str] = {}
    whole: set[Tag] = set()
    at = 0
    for length, tag in trace.runs:
        if tag.kind == FIELD:
            if tag.parts:
                whole.update(tag.parts)
            else:
                base = tag.base
                shown[base] = shown.get(base, "") + trace.text[at : at + length]
        at += length

    def kept(value: Any) -> bool:
        if isinstance(value, Traced):
            return all(_kept(tag, shown, whole) for _, tag in value._runs)
        if isinstance(value, Mapping):
            if isinstance(value, Record) and value._tag in whole:
                return True
            return all(kept(item) for item in value.values())
        return all(kept(item) for item in value) if isinstance(value, list) else True

    lost = []
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            content = [part.get("text") for part in content]
        if not kept(content):
            lost.append(Lost(i, "content"))
        if "reasoning_content" in message and not any(
            kept(message[key]) for key in _REASONING if isinstance(message.get(key), str)
        ):
            lost.append(Lost(i, "reasoning_content"))
        for call in message.get("tool_calls") or ():
            function = call["function"]
            if not (kept(function.get("name")) and kept(function.get("arguments"))):
                lost.append(Lost(i, "tool_calls"))
                break
    if tools and not all(kept(tool.get("function", tool).get("name")) for tool in tools):
        lost.append(Lost(NOBODY, "tools"))
    return lost


def _kept(tag: Tag, shown: Mapping[Tag, str], whole: set[Tag]) -> bool:
    got = shown.get(tag, "")
    if got == tag.text or tag in whole:
        return True
    wanted = tag.text.strip()
    return wanted in got or _bare(wanted) in _bare(got)


def _bare(text: str) -> str:
    """Without white space and thinking tags."""
    return "".join(_THINK_TAGS.sub("", text).split())
