"""Values against JSON Schemas: what is told of each that does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.json_schema import problems


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "integer"}, [0, -3, 2.0, 10**400], [1.5, "1", True, None]),
        ({"type": "number"}, [0, 1.5], [True, "1"]),
        ({"type": "string"}, ["", "x"], [1, None, ["x"]]),
        ({"type": "boolean"}, [True, False], [0, 1, "true"]),
        ({"type": "null"}, [None], [0, "", False]),
        ({"type": ["string", "null"]}, ["x", None], [1]),
        ({"type": "dict"}, [{}], [[]]),
        ({"enum": [1, "a", None]}, [1, 1.0, "a", None], [True, "b", 0]),
        ({"const": {"a": [1]}}, [{"a": [1]}], [{"a": [1, 2]}, {"a": [True]}]),
        ({"minimum": 1, "exclusiveMaximum": 3}, [1, 2.9, "text"], [0, 3]),
        ({"maximum": 3, "exclusiveMinimum": 1}, [3], [1, 3.1]),
        ({"multipleOf": 0.1}, [0.3, 7, 0], [0.35, float("inf")]),
        ({"minLength": 2, "maxLength": 3}, ["ab", "\u00e4bc"], ["a", "abcd"]),
        ({"pattern": "^a+$"}, ["aa"], ["b"]),
        (
            {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
            [{"a": "x"}, {"a": "x", "b": 1}],
            [{}, {"a": 1}],
        ),
        ({"properties": {"a": {}}, "additionalProperties": False}, [{"a": 1}], [{"b": 1}]),
        ({"additionalProperties": {"type": "integer"}}, [{"a": 1}], [{"a": "1"}]),
        ({"minProperties": 1, "maxProperties": 2}, [{"a": 1}], [{}, {"a": 1, "b": 1, "c": 1}]),
        ({"items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, [[1]], [[], ["1"], [1] * 3]),
        (
            {"prefixItems": [{"type": "string"}], "items": {"type": "integer"}},
            [["a", 1]],
            [["a"] * 2],
        ),
        ({"uniqueItems": True}, [[1, 2], [{"a": 1}]], [[1, 1], [{"a": 1}, {"a": 1}]]),
        ({"anyOf": [{"type": "string"}, {"minimum": 3}]}, ["x", 3], [2]),
        ({"oneOf": [{"minimum": 1}, {"maximum": 3}]}, [0, 4], [2]),
        ({"allOf": [{"minimum": 1}, {"maximum": 3}]}, [2], [0, 4]),
        ({"not": {"type": "string"}}, [1], ["x"]),
        (
            {"$defs": {"n": {"type": "integer"}}, "items": {"$ref": "#/$defs/n"}},
            [[1, 2]],
            [["x"]],
        ),
        (True, [1, None], []),
        (False, [], [1]),
        ({"type": "string", "format": "date", "title": "?", "default": 3}, ["x"], [3]),
    ],
)
def test_values(schema: Any, right: list[Any], wrong: list[Any]):
    assert [value for value in right if problems(value, schema)] == []
    assert [value for value in wrong if not problems(value, schema)] == []


def test_all_problems_are_told_with_their_paths():
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "array", "items": {"type": "integer", "minimum": 1}},
            "unit": {"enum": ["C", "F"]},
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    assert problems({"days": [1, 0, "x"], "unit": "K", "when": 1}, schema) == [
        "city: missing",
        "days[1]: expected at least 1; found 0",
        'days[2]: expected integer; found "x"',
        'unit: expected one of "C", "F"; found "K"',
        "when: not known; known are city, days, unit",
    ]
    assert problems(3, {"type": "string"}) == ["the value: expected string; found 3"]
    assert problems(3, {"type": "string"}, "answer") == ["answer: expected string; found 3"]
    nearest = problems({"a": 1}, {"anyOf": [{"type": "string"}, {"required": ["b"]}]})
    assert nearest == ["the value: none of the 2 forms allowed; nearest: the value: expected "
                       'string; found {"a": 1}']  # fmt: skip


def test_a_wrong_schema_is_told():
    assert "no regular expression" in problems("x", {"pattern": "("})[0]
    assert "known are object" in problems("x", {"type": "text"})[0]
    assert "refers to '#/x'" in problems("x", {"$ref": "#/x"})[0]
    assert "64 levels" in problems("x", {"$ref": "#"})[0]
