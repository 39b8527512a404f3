"""A tool that a model can call: a name, the schema of its arguments, a function.

What goes wrong in a call is told to the model, as an answer that begins with "error:", and counted;
nothing that a model writes can end a run.
"""

from __future__ import annotations

import inspect
import json
import queue
import re
import threading
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

from posttrain.json_schema import problems

MAX_ANSWER = 8192
"""Characters of a tool's answer that are handed to the model; what is cut is said."""


@dataclass(frozen=True)
class Tool:
    """function(arguments as a dict) -> what the model is told.

    schema: {"type": "function", "function": {"name", "description", "parameters"}}, as chat
    templates take it. quick: done in well under a millisecond, so that it needs no thread. seconds:
    how long another one may take.
    """

    name: str
    schema: Mapping[str, Any]
    function: Callable[[dict[str, Any]], Any]
    quick: bool = False
    seconds: float = 60.0


class ToolError(Exception):
    """What a tool raises to tell the model, in its message, what is wrong with a call."""


@dataclass(frozen=True)
class Answer:
    """What a call came to. text: for the model; failed: it holds an error."""

    text: str
    failed: bool


def call_tool(tools: Mapping[str, Tool], name: str, arguments: Mapping[str, Any]) -> Answer:
    """Runs one call. Never raises (but for KeyboardInterrupt and its like)."""
    tool = tools.get(name)
    if tool is None:
        return failure(f"there is no tool named {name!r}; there are: {', '.join(tools) or 'none'}")
    given = dict(arguments)
    try:
        if wrong := problems(given, tool.schema["function"].get("parameters", {})):
            return failure(f"wrong arguments for {name}: {'; '.join(wrong)}")
        text = tool.function(given) if tool.quick else _in_time(tool, given)
    except ToolError as error:
        return failure(str(error))
    except Exception as error:  # whatever a user's function raises is the call's failure
        return failure(f"{name} raised {type(error).__name__}: {error}")
    if not isinstance(text, str):
        text = json.dumps(text, ensure_ascii=False, default=str)
    return Answer(_cut(text), failed=False)


def _in_time(tool: Tool, arguments: dict[str, Any]) -> Any:
    """What the tool says, from a thread of its own: one that hangs is left behind."""
    said: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            said.put((tool.function(arguments), None))
        except Exception as error:
            said.put((None, error))

    threading.Thread(target=run, name=f"tool {tool.name}", daemon=True).start()
    try:
        value, error = said.get(timeout=tool.seconds)
    except queue.Empty:
        raise ToolError(f"{tool.name} took more than {tool.seconds:g} s") from None
    if error is not None:
        raise error
    return value


def failure(reason: str) -> Answer:
    """A failed call, as the model is told of it."""
    return Answer(_cut(f"error: {reason}"), failed=True)


def _cut(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # half a pair of surrogates is no text
    if len(text) <= MAX_ANSWER:
        return text
    return f"{text[:MAX_ANSWER]}\n[{len(text) - MAX_ANSWER} more characters cut off]"


def tool_of(function: Callable[..., Any], name: str | None = None) -> Tool:
    """A tool from a Python function: its type hints and its docstring are the schema.

    The first paragraph of the docstring is the description; a line `argument: what it is` below
    `Args:` describes an argument. ValueError where an argument has no type hint, one that JSON has
    no word for, or a name of its own (*args, positional-only).
    """
    name = name or function.__name__
    wrong, properties, required = [], {}, []
    text = inspect.getdoc(function) or ""
    about = _argument_lines(text)
    hints = typing.get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            wrong.append(f"{parameter.name}: arguments are handed over by name")
        elif parameter.name not in hints:
            wrong.append(f"{parameter.name}: no type hint")
        else:
            try:
                schema = _schema_of(hints[parameter.name])
            except ValueError as error:
                wrong.append(f"{parameter.name}: {error}")
                continue
            if parameter.name in about:
                schema = {**schema, "description": about[parameter.name]}
            properties[parameter.name] = schema
            if parameter.default is parameter.empty:
                required.append(parameter.name)
    if not text:
        wrong.append("no docstring: the model would not know what it is for")
    if wrong:
        raise ValueError(f"{name} cannot be a tool: {'; '.join(wrong)}")
    described = " ".join(text.split("\n\n")[0].split())
    return Tool(
        name,
        function_schema(name, described, properties, required),
        lambda arguments: function(**arguments),
    )


def function_schema(
    name: str, description: str, properties: Mapping[str, Any], required: Sequence[str]
) -> dict[str, Any]:
    """A function as chat templates take it."""
    parameters = {"type": "object", "properties": dict(properties), "required": list(required)}
    parameters["additionalProperties"] = False
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def _schema_of(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint. ValueError: there is none."""
    if hint is Any:
        return {}
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(arg) for arg in args]}
    if hint is list or origin is list:
        return {"type": "array", "items": _schema_of(args[0]) if args else {}}
    if hint is dict or (origin is dict and args[0] is str):
        extra = {"additionalProperties": _schema_of(args[1])} if args else {}
        return {"type": "object", **extra}
    raise ValueError(f"JSON has no word for {hint!r}")


def _argument_lines(text: str) -> dict[str, str]:
    _, _, below = text.partition("Args:\n")
    found = re.findall(r"^\s+(\w+)(?: \([^)]*\))?: (.+)$", below, re.MULTILINE)
    return dict(found)
