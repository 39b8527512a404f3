"""JSON of a form, and calls of tools."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from posttrain.rewards.json_schema import JSONForm
from posttrain.rewards.tool_call import ToolCall
from posttrain.types import Rollout
from tests.rewards.rollouts import rollout

FORM = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"age": 3}', 1.0),
        ('Sure:\n```json\n{"age": 3}\n```', 1.0),
        ('```json\n{"age": 3}\n```\n```json\n{"age": 4}\n```', 0.0),
        ('{"age": -3}', 0.0),
        ('{"age": "3"}', 0.0),
        ('{"age": 3, "x": 1}', 0.0),
        ("{}", 0.0),
        ("age 3", 0.0),
        ("[" * 100_000, 0.0),
    ],
    ids=range(9),
)
def test_json_of_a_form(text, value):
    assert JSONForm(form=FORM)(rollout(text)) == value
    assert JSONForm()(rollout(text, FORM)) == value
    assert JSONForm(key="form")(rollout(text, {"form": FORM})) == value
    assert JSONForm()(rollout(text)) is None


def test_a_schema_that_is_wrong_is_told():
    with pytest.raises(ValueError, match="asks for type 'strin'"):
        JSONForm(form={"type": "strin"})(rollout('"x"'))


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def wanted(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        (call("add", a=1, b=2.0), [wanted("add", a=1.0, b=2)], 1.0),
        (call("add", a=1, b=2.0), wanted("add", a=1, b=2), 1.0),
        (call("add", a=1), [wanted("add", a=1, b=2)], 0.0),
        (call("add", a=True), [wanted("add", a=1)], 0.0),
        (call("add", a="X"), [wanted("add", a="x")], 0.0),
        (call("sub", a=1), [wanted("add", a=1)], 0.0),
        (call("f") + call("g"), [wanted("g"), wanted("f")], 1.0),
        (call("f") + call("f"), [wanted("f")], 0.0),
        (call("f"), [wanted("f"), wanted("f")], 0.0),
        (call("f") + call("g"), [wanted("f"), wanted("f")], 0.0),
        (
            call("f", x=[1, {"y": 2}]),
            [{"type": "function", "function": wanted("f", x=[1, {"y": 2}])}],
            1,
        ),
        ("no call", [], 1.0),
        ("no call", [wanted("f")], 0.0),
        (call("f"), [], 0.0),
        (call("f"), None, None),
    ],
)
def test_calls_as_the_answer_lists_them(text, answer, value):
    assert ToolCall()(rollout(text, answer)) == value


def test_order_case_and_shares():
    two, back = call("f") + call("g"), [wanted("g"), wanted("f")]
    assert ToolCall(ordered=True)(rollout(two, back)) == 0.0
    assert ToolCall(ordered=True)(rollout(two, back[::-1])) == 1.0
    assert ToolCall(ignore_case=True)(rollout(call("f", a="X"), [wanted("f", a="x")])) == 1.0
    part = ToolCall(partial=True)
    assert part(rollout(two, [wanted("f")])) == 0.5
    assert part(rollout(call("f"), [wanted("f"), wanted("h")])) == 0.5
    assert part(rollout("none", [])) == 1.0


def test_calls_of_all_turns():
    first = {"role": "assistant", "content": "", "tool_calls": [{"function": wanted("f")}]}
    turns = [first, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "It is 3."}]
    assert ToolCall()(rollout("It is 3.", [wanted("f")], messages=turns)) == 1.0


def test_calls_that_can_be_made():
    parameters = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}

    def offered(text: str) -> Rollout:
        given = rollout(text)
        return replace(given, prompt=replace(given.prompt, tools=(tool,)))

    part = ToolCall(match="schema")
    assert part(offered(call("f", a=1))) == 1.0
    assert part(offered(call("f", a="1"))) == 0.0
    assert part(offered(call("g", a=1))) == 0.0
    assert part(offered("none")) == 0.0
    assert part(rollout(call("f", a=1))) is None


def test_answers_that_are_no_calls():
    with pytest.raises(ValueError, match="the right calls must be a list; found 42"):
        ToolCall()(rollout(call("f"), 42))
    with pytest.raises(ValueError, match="a call must be"):
        ToolCall()(rollout(call("f"), ["f"]))
