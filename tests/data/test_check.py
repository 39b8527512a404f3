"""One file with every defect we know of: each is reported at its line, with field and fix."""

from __future__ import annotations

import json

import pytest

from posttrain.data.check import check
from posttrain.data.config import DataConfig
from tests.data.fakes import FakeChat

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "r", "tool_call_id": "c1"}


def talk(*messages, **columns):
    return json.dumps({"messages": messages, **columns}).encode()


def call(**changes):
    """A conversation with one call, whose function is changed."""
    function = {k: v for k, v in {**CALL["function"], **changes}.items() if v is not ...}
    return talk(USER, {**CALLS, "tool_calls": [{**CALL, "function": function}]}, RESULT, ANSWER)


# the line, the field, what was found, what to do; a good line stands between any two
DEFECTS = [
    (b'{"messages": [', "line", "bad JSON", "one JSON object per line"),
    (b'{"messages": NaN}', "line", "NaN is not JSON", "one JSON object per line"),
    (b'{"messages": [], "messages": []}', "messages", "key given twice", "keep one"),
    (b'{"messages": "\xc3("}', "line", "invalid UTF-8 at byte 14: 0xc3", "save the file as UTF-8"),
    (b"  ", "line", "blank line", "remove it"),
    (b"[1]", "row", "wrong type: a list of 1", "make it an object"),
    (b'{"text": "t"}', "messages", "missing or null", "make it a list of messages"),
    (talk(), "messages", "an empty list", "remove the row"),
    (b'{"messages": "hi"}', "messages", 'wrong type: "hi"', "make it a list of messages"),
    (b'{"mesages": [1]}', "mesages", "unknown column", "did you mean messages?"),
    (talk(USER, "a"), "messages[1]", 'wrong type: "a"', "an object with role and content"),
    (talk({"content": "q"}, ANSWER), "messages[0].role", "missing", "one of system, user"),
    (talk({**USER, "role": 1}, ANSWER), "messages[0].role", "wrong type: int 1", "one of system"),
    (talk({**USER, "role": "human"}, ANSWER), "messages[0].role", "unknown role", "write user"),
    (talk({**USER, "role": "usr"}, ANSWER), "messages[0].role", 'role "usr"', "write user"),
    (talk({"role": "user"}, ANSWER), "messages[0].content", "missing or null", "give it a text"),
    (talk({**USER, "content": 3}, ANSWER), "messages[0].content", "int 3", "make it a string"),
    (talk({**USER, "content": " "}, ANSWER), "messages[0].content", "empty text", "remove the row"),
    (talk(USER, {**ANSWER, "content": ""}), "messages[1].content", "empty answer", "write the ans"),
    (
        talk({**USER, "contnt": "x"}, ANSWER),
        "messages[0].contnt",
        "unknown",
        "did you mean content",
    ),
    (talk({**USER, "when": 1}, ANSWER), "messages[0].when", "unknown key", "ignore_keys"),
    (
        talk({**USER, "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER),
        "messages[0].content[0].type",
        'content part of type "image_url"',
        "remove the part",
    ),
    (talk(SYSTEM, SYSTEM, USER, ANSWER), "messages[1].role", "second system", "join them"),
    (talk(USER, SYSTEM, ANSWER), "messages[1].role", "system message not first", "move it"),
    (
        talk(USER, RESULT, ANSWER),
        "messages[1].role",
        "tool result without a call",
        "put tool_calls",
    ),
    (
        talk(USER, CALLS, RESULT, {"role": "tool", "content": "again"}, ANSWER),
        "messages[3].role",
        "tool result without a call",
        "put tool_calls",
    ),
    (
        talk(USER, CALLS, {**RESULT, "tool_call_id": "c9"}, ANSWER),
        "messages[2].tool_call_id",
        '"c9" answers no open call',
        "use one of 'c1'",
    ),
    (call(name=...), "messages[1].tool_calls[0].function.name", "without a name", "write the name"),
    (
        call(arguments="{x"),
        "messages[1].tool_calls[0].function.arguments",
        "no JSON",
        "write the arguments",
    ),
    (call(arguments=...), "messages[1].tool_calls[0].function.arguments", "missing", "an object"),
    (call(arguments="[1]"), "messages[1].tool_calls[0].function.arguments", "list", "an object"),
    (call(args={}), "messages[1].tool_calls[0].function.args", "unknown key", "did you mean"),
    (
        talk(USER, CALLS, RESULT, CALLS, RESULT, ANSWER),
        "messages[3].tool_calls[0].id",
        "duplicate tool call id",
        "its own id",
    ),
    (talk({**USER, "tool_calls": [CALL]}, ANSWER), "messages[0].tool_calls", "role user", "only"),
    (talk({**USER, "tool_call_id": "c"}, ANSWER), "messages[0].tool_call_id", "role user", "tool"),
    (talk({**USER, "thinking": "x"}, ANSWER), "messages[0].reasoning_content", "role user", "only"),
    (talk(USER, {**ANSWER, "thinking": 1}), "messages[1].reasoning_content", "int 1", "a string"),
    (talk(USER), "messages", "no assistant message", "nothing to train on"),
    (talk(USER, ANSWER, USER), "messages[2].role", "last message has role user", "add the answer"),
    (talk(USER, {**ANSWER, "weight": -1}), "messages[1].weight", "out of range: -1", "0 or more"),
    (talk(USER, {**ANSWER, "weight": True}), "messages[1].weight", "bool True", "make it a number"),
    (talk({**USER, "weight": 1}, ANSWER), "messages[0].weight", "role user", "remove it"),
    (talk(USER, {**ANSWER, "weight": 0}), "row", "no token of it is trained", "weight over 0"),
    (talk({**USER, "content": "a\0b"}, ANSWER), "messages[0].content", "NUL U+0000 at", "remove"),
    (talk({**USER, "content": "\x1b"}, ANSWER), "messages[0].content", "control char", "remove"),
    (talk({**USER, "content": "\ud83d"}, ANSWER), "messages[0].content", "surrogate", "a pair"),
    (
        call(arguments={"a": ["\udc00"]}),
        "messages[1].tool_calls[0].function.arguments.a[0]",
        "lone surrogate",
        "a pair",
    ),
    (talk(USER, ANSWER, tools="[1"), "tools", "no JSON", "the list of tools"),
    (talk(USER, ANSWER, tools=[{}]), "tools[0].function.name", "without a name", "write the name"),
    (talk(USER, ANSWER, chat_template_kwargs=1), "chat_template_kwargs", "int 1", "an object"),
    (talk({**USER, "content": "refuse me"}, ANSWER), "row", "the template refuses", "chat section"),
    (talk(USER, {**ANSWER, "content": "x" * 99}), "row", "103 tokens, over", "raise data.seq_len"),
]
GOOD = talk(SYSTEM, USER, CALLS, RESULT, ANSWER)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    file = tmp_path_factory.mktemp("check") / "bad.jsonl"
    file.write_bytes(b"".join(GOOD + b"\n" + row[0] + b"\n" for row in DEFECTS))
    cfg = DataConfig(sources={"bad": {"path": str(file)}}, seq_len=100, too_long="error", workers=0)
    return check(cfg, FakeChat()), str(file)


@pytest.mark.parametrize("k", range(len(DEFECTS)))
def test_each_defect_is_at_its_line_with_field_and_fix(checked, k):
    found, file = checked
    _, field, what, fix = DEFECTS[k]
    here = [d for d in found.defects if d.line == 2 * k + 2]
    assert [(d.file, d.field) for d in here] == [(file, field)], here
    assert what in here[0].found
    assert fix in here[0].fix


def test_good_lines_have_no_defect_and_the_order_is_the_files(checked):
    found, _ = checked
    assert len(DEFECTS) >= 20
    assert found.rows == 2 * len(DEFECTS)
    assert [d.line for d in found.defects] == [2 * k + 2 for k in range(len(DEFECTS))]


def test_without_a_template_the_form_alone_is_checked(checked):
    found, file = checked
    cfg = DataConfig(sources={"bad": {"path": file}}, seq_len=100, workers=0)
    form = check(cfg, None).defects
    assert {d.line for d in found.defects} - {d.line for d in form} == {
        2 * k + 2 for k, row in enumerate(DEFECTS) if row[1] == "row" and k > 10
    }


def test_all_that_is_wrong_with_one_row_is_said(tmp_path):
    bad = {**ANSWER, "content": "", "weight": "x"}
    row = talk({**USER, "content": 3}, {"role": "bot", "content": "x"}, bad, tools="[")
    (tmp_path / "a.jsonl").write_bytes(row)
    cfg = DataConfig(sources={"a": {"path": str(tmp_path / "a.jsonl")}}, workers=0)
    assert {d.field for d in check(cfg, None).defects} == {
        "messages[0].content",
        "messages[1].role",
        "messages[2].content",
        "messages[2].weight",
        "tools",
    }


def test_what_was_found_can_be_printed(checked):
    found, _ = checked
    for defect in found.defects:
        line = str(defect)
        assert line.isprintable(), line
        line.encode()
