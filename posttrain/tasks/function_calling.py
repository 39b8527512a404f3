"""BFCL, simple and multiple: one call of the right function with right arguments.

Source: the Berkeley Function-Calling Leaderboard (Patil et al. 2025, ICML); calls are matched by
the rules of its AST evaluation for Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from posttrain.config import semantic
from posttrain.data.rows import Problem, RowError, show, wrong_type
from posttrain.tasks.base import Question, Rewards
from posttrain.tasks.files import FileTask, Paths, asked, read_all, texts
from posttrain.types import Rollout

_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
"""BFCL's names of types that JSON Schema has other words for."""
_KINDS: dict[str, Callable[[Any], bool]] = {
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, Mapping),
}
_PASSED_OVER = re.compile(r"[ ,./\-_*^]")
LEFT_OUT = ""  # among the values of an argument: it may be left out


class BFCL(FileTask):
    """Rows {"id", "question": [[message, ...]], "function": [{name, description, parameters}]};
    what may be answered is in a file of its own, {"id", "ground_truth": [{name: {argument: [values
    that are right]}}]}, or in the same row.

    Prompt.answer: the ground_truth. Prompt.tools: the functions, with types in JSON Schema's words.
    """

    name = "bfcl"
    rewards: ClassVar[Rewards] = {
        "correct": {"type": "posttrain.tasks.function_calling:right_call"}
    }

    answers: Paths = semantic(
        None, help="the files with ground_truth, by id; none = it is in the rows"
    )

    def reader(self) -> Callable[[Mapping[str, Any]], Question]:
        """Joins the rows with their answers."""
        truths = dict(read_all(self.answers, "task.answers", _truth)) if self.answers else None

        def joined(row: Mapping[str, Any]) -> Question:
            if truths is None:
                return self.read(row)
            (name,) = texts(row, "id")
            if name not in truths:
                fix = "add its ground_truth to the files of task.answers"
                raise RowError([Problem("id", f"{show(name)} has no answer", fix)])
            return self.read({**row, "ground_truth": truths[name]})

        return joined

    def read(self, row: Mapping[str, Any]) -> Question:
        (name,), (_, truth) = texts(row, "id"), _truth(row)
        turns, functions = row.get("question"), row.get("function")
        if not isinstance(turns, list) or len(turns) != 1:
            fix = "make it a list with the messages of one turn, as simple and multiple have it"
            raise RowError([Problem("question", show(turns), fix)])
        if not isinstance(functions, list) or not functions:
            raise RowError([wrong_type("function", functions, "a list of functions")])
        tools = [{"type": "function", "function": _plain_schema(f)} for f in functions]
        said = asked(turns[0], "question[0]", tools)
        known = [tool["function"]["name"] for tool in said.tools]
        if missing := truth.keys() - set(known):
            found = f"calls {', '.join(sorted(missing))}, and the functions are {', '.join(known)}"
            raise RowError([Problem("ground_truth", found, "correct the name")])
        return replace(said, answer=[truth], id=f"bfcl/{name}")


def _truth(row: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(id, {function: {argument: values}}) of the one call that is right. RowError."""
    (name,), calls = texts(row, "id"), row.get("ground_truth")
    if isinstance(calls, Mapping):
        calls = [calls]
    fix = "make it a list of one object, {function: {argument: [values that are right]}}"
    if not isinstance(calls, list) or len(calls) != 1 or not isinstance(calls[0], Mapping):
        raise RowError([Problem("ground_truth", show(calls), fix)])
    for arguments in calls[0].values():
        if not isinstance(arguments, Mapping):
            raise RowError([Problem("ground_truth", show(arguments), fix)])
        for argument, values in arguments.items():
            if not isinstance(values, list):
                raise RowError([Problem(f"ground_truth.{argument}", show(values), fix)])
    return name, calls[0]


def _plain_schema(value: Any) -> Any:
    """The same with JSON Schema's names of types."""
    if isinstance(value, list):
        return [_plain_schema(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: _TYPES.get(inner, inner)
        if key == "type" and isinstance(inner, str)
        else _plain_schema(inner)
        for key, inner in value.items()
    }


def right_call(rollout: Rollout) -> float:
    """1 if the answer is one call, of the right function with right arguments; else 0. A reward.

    The arguments are those of the function, the required ones among them; each is of its type (or
    of the type of a right value, where BFCL lets a variable stand) and one of its right values.
    Texts are compared without case, spaces and the marks , . / - _ * ^, and with ' as ".
    """
    calls = rollout.messages[-1].get("tool_calls") or () if rollout.messages else ()
    if len(calls) != 1:
        return 0.0
    (truth,) = rollout.prompt.answer
    name, arguments = calls[0]["function"]["name"], calls[0]["function"]["arguments"]
    if name not in truth or not isinstance(arguments, Mapping):
        return 0.0
    schema = next(
        tool["function"].get("parameters", {})
        for tool in rollout.prompt.tools
        if tool["function"]["name"] == name
    )
    right, known = truth[name], schema.get("properties", {})
    if any(argument not in arguments for argument in schema.get("required", ())):
        return 0.0
    given = all(
        argument in right
        and argument in known
        and _is_one_of(value, right[argument], known[argument])
        for argument, value in arguments.items()
    )
    left_out = all(
        LEFT_OUT in values for argument, values in right.items() if argument not in arguments
    )
    return float(given and left_out)


def _is_one_of(value: Any, right: Sequence[Any], schema: Mapping[str, Any]) -> bool:
    of_type = _KINDS.get(schema.get("type", ""), lambda _: True)(value)
    if not of_type and not any(type(value) is type(one) for one in right if one != LEFT_OUT):
        return False
    return any(_same(value, other) for other in right if other != LEFT_OUT or value == LEFT_OUT)


def _same(value: Any, right: Any) -> bool:
    """Is it this right value? An object's values are each a list of right ones."""
    if isinstance(value, str) and isinstance(right, str):
        return _bare(value) == _bare(right)
    if isinstance(value, list) and isinstance(right, list):
        return len(value) == len(right) and all(map(_same, value, right))
    if isinstance(value, Mapping) and isinstance(right, Mapping):
        left_out = [key for key in right if key not in value]
        return (
            all(key in right and _among(inner, right[key]) for key, inner in value.items())
        ) and all(LEFT_OUT in right[key] for key in left_out)
    return isinstance(value, bool) == isinstance(right, bool) and value == right


def _among(value: Any, right: Any) -> bool:
    return any(_same(value, one) for one in right) if isinstance(right, list) else False


def _bare(text: str) -> str:
    return _PASSED_OVER.sub("", text).lower().replace("'", '"')
