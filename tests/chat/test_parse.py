"""A model's text back to a message, and round trips through real templates."""

from __future__ import annotations

import json

import pytest

from posttrain.chat.parse import broken_call, parse_assistant
from tests.chat.samples import CALL, THINK, TOOLS, template_of, trained

FUNCTION = CALL["function"]


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("Hello", "Hello", None),
        ("<think>\nhm\n</think>\n\nHello", "Hello", "hm"),
        ("hm\n</think>\nHello", "Hello", "hm"),
        ("<think>cut off", "", "cut off"),
        ("[THINK]hm[/THINK]Hello", "Hello", "hm"),
        ("<think>\n\n</think>\n\nHello", "Hello", None),
        ("  spaces stay ", "  spaces stay ", None),
    ],
)
def test_thinking(text, content, reasoning):
    message = parse_assistant(text)
    assert message["role"] == "assistant"
    assert (message["content"], message.get("reasoning_content")) == (content, reasoning)
    assert "tool_calls" not in message


ARGUMENTS = json.dumps(FUNCTION["arguments"])


@pytest.mark.parametrize(
    ("text", "content", "count"),
    [
        (f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>', "", 1),
        (
            f'Look:\n<tool_call>{{"name": "get_weather", "arguments": {ARGUMENTS}}}</tool_call>\n'
            f'<tool_call>{{"name": "get_weather", "arguments": {ARGUMENTS}}}</tool_call>',
            "Look:",
            2,
        ),
        (f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ARGUMENTS}}}]', "", 1),
        (f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}", "", 1),
        (
            f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}",
            "",
            2,
        ),
        (f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}', "", 1),
        (f'<|python_tag|>{{"name": "get_weather", "parameters": {ARGUMENTS}}}', "", 1),
    ],
)
def test_tool_calls(text, content, count):
    message = parse_assistant(text)
    assert message["content"] == content
    assert [call["function"] for call in message["tool_calls"]] == [FUNCTION] * count
    assert len({call["id"] for call in message["tool_calls"]}) == count
    assert all(len(call["id"]) == 9 for call in message["tool_calls"])


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": broken}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        "[TOOL_CALLS]not json",
        '{"name": "x"}',
        "[1, 2]",
        '{"answer": 42}',
        "[" * 10_000,
        "9" * 10_000,
    ],
    ids=range(8),
)
def test_what_does_not_parse_stays_text(text):
    assert parse_assistant(text) == {"role": "assistant", "content": text}


def deep(levels: int) -> str:
    return '{"name": "f", "arguments": {"x": ' + "[" * levels + "]" * levels + "}}"


def test_arguments_that_nobody_could_render_are_no_call():
    assert "tool_calls" in parse_assistant(deep(20))
    assert parse_assistant(deep(40)) == {"role": "assistant", "content": deep(40)}


def test_half_a_pair_of_surrogates_is_no_text():
    call = '{"name": "f", "arguments": {"x": "a\\ud800b \\ud83d\\ude00 \\u00e9"}, "id": 7}'
    (found,) = parse_assistant(call)["tool_calls"]
    assert found["function"]["arguments"] == {"x": "a?b \U0001f600 \u00e9"}
    assert found["id"] == "call00000"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("Just words, {and} brackets.", None),
        ('{"answer": 42}', None),
        ("Look: <tool_call>{", "<tool_call> is never closed"),
        ("<tool_call>[]</tool_call>", "what stands after <tool_call> is no JSON object"),
        ("[TOOL_CALLS]x", "what stands after [TOOL_CALLS] is no JSON object"),
        ("<|python_tag|>x.call()", "what stands after <|python_tag|> is no JSON object"),
        ('{"name": "f", "parameters": {"x": }}', "this is no JSON object"),
    ],
)
def test_calls_that_were_begun_and_are_none(content, why):
    assert parse_assistant(content)["content"] == content
    found = broken_call(content)
    assert found is None if why is None else str(found).startswith(why)


@pytest.mark.parametrize("name", ["trl__qwen3", "mistral-common__v13_think"])
def test_what_is_trained_parses_back(name, data_dir):
    lines = (data_dir / "data/chat_templates.jsonl").read_text("utf-8").splitlines()
    source = next(r["chat_template"] for r in map(json.loads, lines) if r["name"] == name)
    template = template_of(data_dir, source)
    stop = template.tokenizer.token(template.stop_ids[-1])
    for conversation in (THINK, TOOLS):
        turns = [
            turn
            for example in template.examples(conversation)
            for turn in trained(example, template.tokenizer)
        ]
        written = [m for m in conversation.messages if m["role"] == "assistant"]
        for text, message in zip(turns, written, strict=True):
            got = parse_assistant(text.removesuffix(stop))
            assert got["content"] == message["content"]
            assert got.get("reasoning_content") == message.get("reasoning_content")
            calls = [c["function"] for c in message.get("tool_calls", ())]
            assert [c["function"] for c in got.get("tool_calls", ())] == calls
