"""Is a JSON value what a JSON Schema asks for? The subset in which tools describe their arguments.

Known: type, enum, const, properties, required, additionalProperties, minProperties, maxProperties,
items, prefixItems, minItems, maxItems, uniqueItems, minimum, maximum, exclusiveMinimum,
exclusiveMaximum, multipleOf, minLength, maxLength, pattern, anyOf, oneOf, allOf, not, and $ref
within the schema. Words that only describe (title, description, default, format, examples ...) are
passed over, as the standard has it. Source: JSON Schema 2020-12, validation and core.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, Mapping),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": lambda v: _is_number(v),
    "integer": lambda v: _is_number(v) and (isinstance(v, int) or v.is_integer()),
}
# what other languages' declarations of functions call these
_ALIASES = {
    "dict": "object",
    "list": "array",
    "tuple": "array",
    "str": "string",
    "bool": "boolean",
    "float": "number",
    "int": "integer",
    "any": "",
}
_DEPTH = 64


def problems(value: Any, schema: Any, where: str = "") -> list[str]:
    """What is wrong with a value, one line each, with the path to it; [] where it is as asked.

    where: what the value is called. A schema that is itself wrong (an unknown type, a $ref to
    nothing, a pattern that is no regular expression) is told as a problem, too.
    """
    return _Checker(schema).check(value, schema, where, 0)


class _Checker:
    def __init__(self, root: Any) -> None:
        self.root = root

    def check(self, value: Any, schema: Any, at: str, depth: int) -> list[str]:
        if schema is True or schema == {}:
            return []
        if schema is False:
            return [f"{at or 'the value'}: nothing is allowed here"]
        if not isinstance(schema, Mapping):
            return [f"{at or 'the value'}: the schema is no object"]
        if depth > _DEPTH:
            return [f"{at or 'the value'}: more than {_DEPTH} levels deep"]
        if "$ref" in schema:
            target = self._target(schema["$ref"])
            if target is None:
                return [f"{at or 'the value'}: the schema refers to {schema['$ref']!r}, not there"]
            found = self.check(value, target, at, depth + 1)
        else:
            found = []
        name = at or "the value"
        wrong = _wrong_type(value, schema.get("type"), name)
        if wrong:
            return [*found, wrong]
        if "enum" in schema and not any(_same(value, item) for item in schema["enum"]):
            allowed = ", ".join(_show(item) for item in schema["enum"])
            found.append(f"{name}: expected one of {allowed}; found {_show(value)}")
        if "const" in schema and not _same(value, schema["const"]):
            found.append(f"{name}: expected {_show(schema['const'])}; found {_show(value)}")
        if isinstance(value, Mapping):
            found += self._object(value, schema, at, depth)
        elif isinstance(value, list):
            found += self._array(value, schema, at, depth)
        elif isinstance(value, str):
            found += _text(value, schema, name)
        elif _is_number(value):
            found += _number(value, schema, name)
        return found + self._combined(value, schema, at, depth)

    def _target(self, ref: Any) -> Any:
        """What `#/$defs/x` points to, None where there is nothing."""
        if ref == "#":
            return self.root
        if not isinstance(ref, str) or not ref.startswith("#/"):
            return None
        node = self.root
        for part in ref[2:].split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(node, Mapping) or part not in node:
                return None
            node = node[part]
        return node

    def _object(self, value: Mapping[Any, Any], schema: Any, at: str, depth: int) -> list[str]:
        name, found = at or "the value", []
        for key in schema.get("required", ()):
            if key not in value:
                found.append(f"{_path(at, key)}: missing")
        known = schema.get("properties", {})
        extra = schema.get("additionalProperties", True)
        for key, item in value.items():
            if key in known:
                found += self.check(item, known[key], _path(at, key), depth + 1)
            elif extra is False:
                names = ", ".join(known) or "none"
                found.append(f"{_path(at, key)}: not known; known are {names}")
            else:
                found += self.check(item, extra, _path(at, key), depth + 1)
        return found + _bounds(len(value), schema, "Properties", name, "entries")

    def _array(self, value: list[Any], schema: Any, at: str, depth: int) -> list[str]:
        name, found = at or "the value", []
        first = schema.get("prefixItems", ())
        for i, item in enumerate(value):
            inner = first[i] if i < len(first) else schema.get("items", True)
            found += self.check(item, inner, f"{at}[{i}]", depth + 1)
        if schema.get("uniqueItems") and _has_twins(value):
            found.append(f"{name}: an entry comes twice")
        return found + _bounds(len(value), schema, "Items", name, "entries")

    def _combined(self, value: Any, schema: Any, at: str, depth: int) -> list[str]:
        def tried(options: Sequence[Any]) -> list[list[str]]:
            return [self.check(value, option, at, depth + 1) for option in options]

        name, found = at or "the value", []
        for part in tried(schema.get("allOf", ())):
            found += part
        for word in ("anyOf", "oneOf"):
            if word not in schema:
                continue
            parts = tried(schema[word])
            fitting = sum(not part for part in parts)
            if fitting == 0:
                nearest = min(parts, key=len, default=["nothing"])[0]
                found.append(f"{name}: none of the {len(parts)} forms allowed; nearest: {nearest}")
            elif word == "oneOf" and fitting > 1:
                found.append(f"{name}: {fitting} forms fit, where exactly one may")
        if "not" in schema and not self.check(value, schema["not"], at, depth + 1):
            found.append(f"{name}: {_show(value)} is not allowed")
        return found


def _has_twins(items: list[Any]) -> bool:
    return len({json.dumps(item, sort_keys=True) for item in items}) < len(items)


def _wrong_type(value: Any, wanted: Any, name: str) -> str:
    if wanted is None:
        return ""
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    names = [_ALIASES.get(word, word) for word in names]
    for word in names:
        if word == "":
            return ""
        if word not in _TYPES:
            return f"{name}: the schema asks for type {word!r}; known are {', '.join(_TYPES)}"
        if _TYPES[word](value):
            return ""
    return f"{name}: expected {' or '.join(names)}; found {_show(value)}"


def _text(value: str, schema: Mapping[str, Any], name: str) -> list[str]:
    found = _bounds(len(value), schema, "Length", name, "characters")
    if "pattern" in schema:
        try:
            fits = re.search(schema["pattern"], value) is not None
        except re.error as error:
            return [*found, f"{name}: the schema's pattern is no regular expression ({error})"]
        if not fits:
            found.append(f"{name}: expected to match {schema['pattern']!r}; found {_show(value)}")
    return found


def _number(value: float, schema: Mapping[str, Any], name: str) -> list[str]:
    found = []
    for word, wrong, sign in (
        ("minimum", lambda v, b: v < b, "at least"),
        ("maximum", lambda v, b: v > b, "at most"),
        ("exclusiveMinimum", lambda v, b: v <= b, "more than"),
        ("exclusiveMaximum", lambda v, b: v >= b, "less than"),
    ):
        bound = schema.get(word)
        if _is_number(bound) and wrong(value, bound):
            found.append(f"{name}: expected {sign} {bound}; found {_show(value)}")
    step: Any = schema.get("multipleOf")
    if _is_number(step) and step > 0 and not _is_multiple(value, step):
        found.append(f"{name}: expected a multiple of {step}; found {_show(value)}")
    return found


def _bounds(size: int, schema: Mapping[str, Any], of: str, name: str, what: str) -> list[str]:
    low, high = schema.get(f"min{of}", 0), schema.get(f"max{of}", size)
    if size < low:
        return [f"{name}: {size} {what}, at least {low} expected"]
    return [f"{name}: {size} {what}, at most {high} expected"] if size > high else []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_multiple(value: float, step: float) -> bool:
    """By the digits as they are written: 0.3 is a multiple of 0.1."""
    return math.isfinite(value) and Fraction(str(value)) % Fraction(str(step)) == 0


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: 1 is 1.0, but true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a == b and (type(a) is type(b) or (_is_number(a) and _is_number(b)))


def _path(at: str, key: Any) -> str:
    return f"{at}.{key}" if at else str(key)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
