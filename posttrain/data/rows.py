"""A row of a source, and how what is wrong with it is said. Light: worker processes import it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SIDES = ("chosen", "rejected")
"""Of a pair, in the order of its examples."""
SHOWN = 60  # characters of a bad value that a message repeats


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong inside a row: where, what was found, what to do."""

    field: str
    found: str
    fix: str


@dataclass(frozen=True, slots=True)
class Defect:
    """A Problem with its place. `line` counts from 1: a line of JSONL, elsewhere a row.

    rendered: what the template made of the row, where the template is what refuses it.
    """

    file: str
    line: int
    field: str
    found: str
    fix: str
    rendered: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: {self.found} -> {self.fix}"


class RowError(ValueError):
    """A row that breaks the rules, with everything found in it."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{p.field}: {p.found} -> {p.fix}" for p in self.problems))


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read. One with `problems` is not to be used: its `value` may be None."""

    file: str
    line: int
    value: Any
    problems: tuple[Problem, ...] = ()


def show(value: Any) -> str:
    """The value in a few characters, safe to print, with its type."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(repr, list(value)[:6])) or 'no keys'}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    text = repr(value) if not isinstance(value, str) else ascii_safe(value)
    text = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
    return f'"{text}"' if isinstance(value, str) else f"{type(value).__name__} {text}"


def ascii_safe(text: str) -> str:
    """The text with control characters and lone surrogates as escapes."""
    text = text[: SHOWN + 1]
    return _UNPRINTABLE.sub(lambda m: m.group().encode("unicode_escape").decode(), text)


# Lone surrogates cannot be encoded, NUL and the other C0 controls are leavings of a broken export.
# Tab, line feed, carriage return and form feed are text.
_BAD_CHARACTER = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def text_problem(value: Any, field: str, *, may_be_empty: bool = False) -> Problem | None:
    """None where `value` is text that can be tokenised; else what is wrong with it."""
    if not isinstance(value, str):
        if value is None:
            return Problem(field, "missing or null", "give it a text, or remove the row")
        return Problem(field, f"wrong type: {show(value)}", "make it a string")
    if bad := _BAD_CHARACTER.search(value):
        code = ord(bad.group())
        kind = "lone surrogate" if code >= 0xD800 else "NUL" if code == 0 else "control character"
        fix = "write the whole character (a pair)" if code >= 0xD800 else "remove it"
        return Problem(field, f"{kind} U+{code:04X} at character {bad.start()}", fix)
    if not may_be_empty and not value.strip():
        return Problem(field, f"empty text {show(value)}", "write the text, or remove the row")
    return None


def json_problem(value: Any, field: str) -> Problem | None:
    """None where all of `value` is plain JSON that can be tokenised; else the first fault."""
    if isinstance(value, str):
        return text_problem(value, field, may_be_empty=True)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if found := text_problem(key, field) or json_problem(inner, f"{field}.{key}"):
                return found
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            if found := json_problem(inner, f"{field}[{i}]"):
                return found
    elif value is not None and not isinstance(value, (bool, int, float)):
        return wrong_type(field, value, "text, a number, a list or an object")
    return None


def null_arguments(value: Any, field: str = "") -> Problem | None:
    """The first tool call whose `arguments` hold nulls that Parquet may have put there.

    A struct column gives every row the keys of all rows: the model would learn to pass nulls.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            where = f"{field}.{key}" if field else str(key)
            if key == "arguments" and isinstance(inner, Mapping) and None in inner.values():
                found = "nulls, as Parquet fills in for the keys of other rows' calls"
                return Problem(where, found, "store arguments as JSON text")
            if problem := null_arguments(inner, where):
                return problem
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            if problem := null_arguments(inner, f"{field}[{i}]"):
                return problem
    return None


def wrong_type(field: str, value: Any, wanted: str) -> Problem:
    """The usual complaint about a type: wanted is like `a list of messages`."""
    if value is None:
        return Problem(field, "missing or null", f"make it {wanted}")
    return Problem(field, f"wrong type: {show(value)}", f"make it {wanted}")
