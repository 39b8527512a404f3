"""What a model wrote, back to a message: content, thinking and tool calls."""

from __future__ import annotations

import json
import re
from typing import Any

_THINKING = (
    re.compile(r"\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL),
    re.compile(r"\s*(?:\[THINK\])?(.*?)\[/THINK\]\s*", re.DOTALL),
)
_UNFINISHED = re.compile(r"\s*(?:<think>|\[THINK\])(.*)", re.DOTALL)
_XML_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_NAMED_CALL = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\](\w+))?\[ARGS\]\s*")
_XML_MARK = "<tool_call>"
_EXPECTED = 'JSON object with "name" and "arguments"'
_LIST_MARK = "[TOOL_CALLS]"
_PYTHON_MARK = "<|python_tag|>"
_LEVELS = 32  # of lists and objects in the arguments of a call


def parse_assistant(text: str) -> dict[str, Any]:
    """An assistant message in the normal form of `types.Message`.

    text: what was generated, without its stop token. Thinking: `<think>...</think>` or
    `[THINK]...[/THINK]` at the head (the opening tag may have been part of the prompt; an unclosed
    one makes all of it thinking). Tool calls: `<tool_call>{...}</tool_call>` (Qwen, Hermes),
    `[TOOL_CALLS][{...}]` and `[TOOL_CALLS]name[ARGS]{...}` (Mistral), one bare JSON object with
    `name` and `parameters` (Llama 3). What does not parse stays content.
    """
    reasoning, text = _split_thinking(text)
    content, calls = _split_calls(text)
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def broken_call(content: str) -> str | None:
    """Why a tool call that was begun in this content is none; None where none was begun.

    content: of a message of `parse_assistant` without tool_calls.
    """
    text = content.strip()
    if _XML_MARK in text:
        inner = text.partition(_XML_MARK)[2]
        if "</tool_call>" not in inner:
            return f"{_XML_MARK} is never closed"
        return f"what stands after {_XML_MARK} is no {_EXPECTED}"
    for mark in (_LIST_MARK, _PYTHON_MARK):
        if mark in text:
            return f"what stands after {mark} is no {_EXPECTED}"
    bare = text.startswith("{") and re.search(r'"(?:arguments|parameters)"\s*:', text)
    return f"this is no {_EXPECTED}" if bare else None


def _split_thinking(text: str) -> tuple[str, str]:
    for pattern in _THINKING:
        if found := pattern.match(text):
            return found[1].strip(), text[found.end() :]
    if found := _UNFINISHED.fullmatch(text):
        return found[1].strip(), ""
    return "", text


def _split_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    matches = list(_XML_CALL.finditer(text))
    if matches:
        calls = [_call(_json(match[1]), i) for i, match in enumerate(matches)]
        if all(calls):
            return _XML_CALL.sub("", text).strip(), [call for call in calls if call]
        return text, []
    content, mark, rest = text.partition(_LIST_MARK)
    if mark:
        calls = _mistral_calls(rest)
        return (content.strip(), calls) if calls else (text, [])
    call = _call(_json(text.removeprefix(_PYTHON_MARK).strip()), 0)
    return ("", [call]) if call else (text, [])


def _mistral_calls(text: str) -> list[dict[str, Any]]:
    """What follows [TOOL_CALLS]: a JSON list, or name[ARGS]{...} for each call."""
    listed = _json(text.strip())
    if isinstance(listed, list):
        calls = [_call(item, i) for i, item in enumerate(listed)]
        return [call for call in calls if call] if all(calls) else []
    calls = []
    for part in text.split(_LIST_MARK):
        named = _NAMED_CALL.match(part)
        arguments = _json(part[named.end() :].strip()) if named else None
        if named is None or not isinstance(arguments, dict):
            return []
        item = {"name": named[1], "arguments": arguments, "id": named[2]}
        calls.append(_call(item, len(calls)))
    return calls


def _call(item: Any, index: int) -> dict[str, Any] | None:
    """A tool call in the normal form; None where it is none. Ids have the nine characters that
    Mistral's templates ask for."""
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get("arguments", item.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(arguments, dict) or not _is_shallow(arguments, _LEVELS):
        return None
    function = {"name": item["name"], "arguments": arguments}
    own = item.get("id")
    call_id = own if isinstance(own, str) and own else f"call{index:05d}"
    return {"id": call_id, "type": "function", "function": function}


def _is_shallow(value: Any, levels: int) -> bool:
    """What is nested without end would exhaust the stack of whoever renders it."""
    if not isinstance(value, (dict, list)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in inner)


def _json(text: str) -> Any:
    """None where it is none that Python reads, too (numbers of thousands of digits)."""
    try:
        value = json.loads(text)
        if "\\u" in text:  # half a pair of surrogates is no text that can be encoded or written
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        return value
    except (ValueError, RecursionError):
        return None
