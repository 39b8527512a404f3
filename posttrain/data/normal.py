"""The door: raw messages in, one Conversation in normal form out, or everything wrong with them.

Nothing past this file checks a message again, and nothing is dropped or guessed here: a key that is
not known, a role that is not known, a result without its call are problems with a field and a fix.
Null values count as absent (Parquet writes every key of a struct into every row).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain.data.rows import Problem, RowError, json_problem, show, text_problem, wrong_type
from posttrain.types import Conversation

ROLES = ("system", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
KEYS = ("role", "content", *REASONING_KEYS, "tool_calls", "tool_call_id", "name", "weight")
PART_TEXT = ("text", "value", "content")  # where a part of a content list keeps its text
_ROLE_HINTS = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}


def normalise(
    raw: Any,
    *,
    where: str = "messages",
    places: Sequence[str] | None = None,
    tools: Any = None,
    template_kwargs: Any = None,
    ignore_keys: Sequence[str] = (),
) -> Conversation:
    """The conversation of `raw` (a list of message objects) in the normal form of types.Message.

    `where` names the column in problems, `places` each message where they come from several
    columns; `tools` is a list of tool objects or its JSON text.
    Raises RowError with every problem of the row.
    """
    problems: list[Problem] = []
    messages: list[dict[str, Any]] = []
    if not isinstance(raw, (list, tuple)):
        problems.append(wrong_type(where, raw, "a list of messages"))
    elif not raw:
        problems.append(Problem(where, "an empty list", "remove the row"))
    else:
        places = places or [f"{where}[{i}]" for i in range(len(raw))]
        for message, place in zip(raw, places, strict=True):
            messages.append(_message(message, place, ignore_keys, problems))
        _order(messages, places, where, problems)
    normal_tools = _tools(tools, problems)
    if template_kwargs is not None and not isinstance(template_kwargs, Mapping):
        problems.append(wrong_type("chat_template_kwargs", template_kwargs, "an object"))
    if problems:
        raise RowError(problems)
    return Conversation(tuple(messages), normal_tools, dict(template_kwargs or {}))


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.75)
    return close[0] if close else None


def _message(
    raw: Any, at: str, ignore_keys: Sequence[str], problems: list[Problem]
) -> dict[str, Any]:
    """One message; what is wrong goes to `problems` and the rest is still read."""
    if not isinstance(raw, Mapping):
        problems.append(wrong_type(at, raw, "an object with role and content"))
        return {}
    raw = {k: v for k, v in raw.items() if v is not None and k not in ignore_keys}
    for key in raw.keys() - set(KEYS):
        meant = did_you_mean(str(key), KEYS)
        fix = f"did you mean {meant}?" if meant else "remove it, or name it in ignore_keys"
        problems.append(Problem(f"{at}.{key}", f"unknown key, value {show(raw[key])}", fix))
    role = _role(raw.get("role"), at, problems)
    message: dict[str, Any] = {"role": role, "content": ""}
    reasoning = [k for k in REASONING_KEYS if k in raw]
    if len(reasoning) > 1:
        found = f"{' and '.join(reasoning)} in one message"
        problems.append(Problem(f"{at}.{reasoning[1]}", found, "keep one of them"))
    thoughts = raw[reasoning[0]] if reasoning else None
    calls = raw.get("tool_calls")
    if calls is not None and not isinstance(calls, (list, tuple)):
        problems.append(wrong_type(f"{at}.tool_calls", calls, "a list of calls"))
        calls = None
    content = raw.get("content")
    before = len(problems)
    if isinstance(content, (list, tuple)):
        content, part_thoughts, part_calls = _parts(content, f"{at}.content", problems)
        thoughts = thoughts if part_thoughts is None else (thoughts or "") + part_thoughts
        calls = [*(calls or ()), *part_calls]
    if calls:
        where = f"{at}.tool_calls"
        message["tool_calls"] = [
            _call(call, f"{where}[{i}]", problems) for i, call in enumerate(calls)
        ]
    if len(problems) == before and (content is not None or not calls):
        # a tool may well answer nothing; an assistant may call without a word
        silent = role == "tool" or bool(calls)
        if problem := text_problem(content, f"{at}.content", may_be_empty=silent):
            problems.append(_answer(problem, role))
        message["content"] = content
    if thoughts is not None:
        if problem := text_problem(thoughts, f"{at}.reasoning_content", may_be_empty=True):
            problems.append(problem)
        elif thoughts:
            message["reasoning_content"] = thoughts
    for key, owner in (("tool_call_id", "tool"), ("name", None)):
        if key in raw:
            if problem := text_problem(raw[key], f"{at}.{key}"):
                problems.append(problem)
            if owner and role and role != owner:
                found = f"{key} on a message of role {role}"
                problems.append(Problem(f"{at}.{key}", found, f"it belongs to role {owner}"))
            message[key] = raw[key]
    if "weight" in raw:
        message["weight"] = _weight(raw["weight"], role, f"{at}.weight", problems)
    for key, present in (("tool_calls", bool(calls)), ("reasoning_content", bool(thoughts))):
        if present and role not in ("", "assistant"):
            found = f"{key} on a message of role {role}"
            problems.append(Problem(f"{at}.{key}", found, "only the assistant has it"))
    return message


def _answer(problem: Problem, role: str) -> Problem:
    if role == "assistant" and problem.found.startswith(("empty", "missing")):
        found = problem.found.replace("empty text", "empty answer")
        return Problem(problem.field, found, "write the answer (or tool_calls), or remove the row")
    return problem


def _role(role: Any, at: str, problems: list[Problem]) -> str:
    if not isinstance(role, str):
        problems.append(wrong_type(f"{at}.role", role, f"one of {', '.join(ROLES)}"))
        return ""
    if role not in ROLES:
        meant = _ROLE_HINTS.get(role.lower()) or did_you_mean(role, ROLES)
        fix = f"write {meant}" if meant else f"use one of {', '.join(ROLES)}"
        problems.append(Problem(f"{at}.role", f"unknown role {show(role)}", fix))
        return ""
    return role


def _weight(weight: Any, role: str, at: str, problems: list[Problem]) -> float:
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number:
        problems.append(wrong_type(at, weight, "a number"))
    elif not math.isfinite(weight) or weight < 0:
        problems.append(Problem(at, f"weight out of range: {weight}", "make it 0 or more"))
    elif role not in ("", "assistant"):
        found = f"a weight on a message of role {role}"
        problems.append(Problem(at, found, "remove it: only the assistant is trained"))
    else:
        return float(weight)
    return 0.0


def _parts(
    parts: Sequence[Any], at: str, problems: list[Problem]
) -> tuple[str, str | None, list[Any]]:
    """(text, reasoning, tool calls) of a content list; texts are joined as they stand."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    for i, part in enumerate(parts):
        where = f"{at}[{i}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            problems.append(wrong_type(where, part, "a text part"))
            continue
        kind = part.get("type", "text")
        key = next((k for k in (*PART_TEXT, kind) if part.get(k) is not None), "text")
        if kind == "tool_call":
            calls.append(part.get(key))
        elif kind in ("text", "reasoning", "thinking"):
            if problem := text_problem(part.get(key), f"{where}.{key}", may_be_empty=True):
                problems.append(problem)
            else:
                (texts if kind == "text" else thoughts).append(part[key])
        else:
            fix = "only text can be trained on here: remove the part or the row"
            problems.append(Problem(f"{where}.type", f"content part of type {show(kind)}", fix))
    return "".join(texts), "".join(thoughts) if thoughts else None, calls


def _json(value: Any, at: str, wanted: str, problems: list[Problem]) -> Any:
    """A JSON text parsed, anything else as it is; None after a complaint."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        found = f"no JSON ({error}): {show(value)}"
        problems.append(Problem(at, found, f"write {wanted}, as an object or as JSON text"))
        return None


def _call(raw: Any, at: str, problems: list[Problem]) -> dict[str, Any]:
    """{"id"?, "type": "function", "function": {"name", "arguments": dict}} of the usual shapes."""
    before = len(problems)
    raw = _json(raw, at, "the call", problems)
    if not isinstance(raw, Mapping):
        if len(problems) == before:
            problems.append(wrong_type(at, raw, "an object with function.name and arguments"))
        return {}
    call: dict[str, Any] = {}
    if raw.get("id") is not None:
        if problem := text_problem(raw["id"], f"{at}.id"):
            problems.append(problem)
        call["id"] = raw["id"]
    if raw.get("type", "function") not in ("function", None):
        problems.append(
            Problem(f"{at}.type", f"tool call of type {show(raw['type'])}", "write function")
        )
    nested = raw.get("function") is not None
    function = raw["function"] if nested else raw
    inner = f"{at}.function" if nested else at
    if not isinstance(function, Mapping):
        problems.append(wrong_type(inner, function, "an object with name and arguments"))
        return call
    allowed = {"name", "arguments", "parameters", "id", "type", "function", "index"}
    for key in ({*raw, *function} - allowed) if nested else (set(raw) - allowed):
        value = function.get(key) if key in function else raw.get(key)
        if value is not None:
            fix = f"did you mean {did_you_mean(str(key), allowed) or 'arguments'}?"
            problems.append(Problem(f"{inner}.{key}", f"unknown key, value {show(value)}", fix))
    if problem := text_problem(function.get("name"), f"{inner}.name"):
        fix = "write the name of the tool"
        problems.append(Problem(problem.field, f"tool call without a name ({problem.found})", fix))
    key = "parameters" if "arguments" not in function and "parameters" in function else "arguments"
    arguments = function.get(key)
    if arguments is None:
        problems.append(wrong_type(f"{inner}.{key}", None, "an object ({} for none)"))
    else:
        before = len(problems)
        arguments = _json(arguments, f"{inner}.{key}", "the arguments", problems)
        if len(problems) == before:
            if not isinstance(arguments, Mapping):
                problems.append(wrong_type(f"{inner}.{key}", arguments, "an object (or its JSON)"))
            elif problem := json_problem(arguments, f"{inner}.{key}"):
                problems.append(problem)
    call |= {"type": "function", "function": {"name": function.get("name"), "arguments": arguments}}
    return call


def _tools(raw: Any, problems: list[Problem]) -> tuple[Mapping[str, Any], ...]:
    """Tool definitions, each as {"type": "function", "function": {...}}."""
    if raw is None or (isinstance(raw, str) and not raw.strip()):
        return ()
    before = len(problems)
    raw = _json(raw, "tools", "the list of tools", problems)
    if len(problems) > before:
        return ()
    if not isinstance(raw, (list, tuple)):
        problems.append(wrong_type("tools", raw, "a list of tools"))
        return ()
    tools = []
    for i, tool in enumerate(raw):
        at = f"tools[{i}]"
        tool = _json(tool, at, "the tool", problems)
        if not isinstance(tool, Mapping):
            problems.append(wrong_type(at, tool, "an object with function.name"))
            continue
        if "function" not in tool:
            tool = {"type": "function", "function": tool}
        function = tool["function"]
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            found = "tool without a name" if isinstance(function, Mapping) else show(function)
            problems.append(Problem(f"{at}.function.name", found, "write the name of the tool"))
        if problem := json_problem(tool, at):
            problems.append(problem)
        tools.append(tool)
    return tuple(tools)


def _order(
    messages: list[dict[str, Any]], places: Sequence[str], where: str, problems: list[Problem]
) -> None:
    """What only the sequence shows: systems, results and their calls, who speaks last."""
    roles = [m.get("role", "") for m in messages]
    systems = [i for i, role in enumerate(roles) if role == "system"]
    for i in systems[1:]:
        found = f"second system message (the first is {places[systems[0]]})"
        problems.append(Problem(f"{places[i]}.role", found, "join them into one, at the start"))
    if systems and systems[0] != 0:
        found = "system message not first"
        fix = f"move it before {places[0]}"
        problems.append(Problem(f"{places[systems[0]]}.role", found, fix))
    open_calls = 0  # calls of the last assistant message that have no result yet
    open_ids: set[Any] = set()
    ids: set[Any] = set()
    for i, message in enumerate(messages):
        at = places[i]
        if roles[i] == "tool":
            given = message.get("tool_call_id")
            if open_calls == 0:
                found = "tool result without a call before it"
                fix = "put tool_calls into the assistant message before it, or remove it"
                problems.append(Problem(f"{at}.role", found, fix))
            elif given is not None and open_ids and given not in open_ids:
                found = f"tool_call_id {show(given)} answers no open call"
                fix = f"use one of {', '.join(sorted(map(repr, open_ids)))}"
                problems.append(Problem(f"{at}.tool_call_id", found, fix))
            open_ids.discard(given)
            open_calls = max(0, open_calls - 1)
            continue
        calls = message.get("tool_calls", ())
        open_calls = len(calls)
        open_ids = {call["id"] for call in calls if isinstance(call.get("id"), str)}
        for k, call in enumerate(calls):
            identity = call.get("id")
            if isinstance(identity, str) and identity in ids:
                found = f"duplicate tool call id {show(identity)}"
                fix = "give each call of the conversation its own id"
                problems.append(Problem(f"{at}.tool_calls[{k}].id", found, fix))
            ids.add(identity if isinstance(identity, str) else None)
    if "" in roles:
        return  # whose turn it was is not known
    if "assistant" not in roles:
        found = "no assistant message"
        problems.append(Problem(where, found, "nothing to train on: add the answer or remove it"))
    elif roles[-1] != "assistant":
        found = f"last message has role {roles[-1]}, not assistant"
        fix = "add the answer, or cut what follows the last one"
        problems.append(Problem(f"{places[-1]}.role", found, fix))
