"""Rows as people have them become conversations in normal form, or problems with a field."""

from __future__ import annotations

import json

import pytest

from posttrain.data.config import SourceConfig
from posttrain.data.formats import FORMATS, Format, find_format, get_format
from posttrain.data.rows import RowError
from posttrain.types import Conversation, Text
from tests.data.rows import read_rows

CFG = SourceConfig(path="x.jsonl")
USER = {"role": "user", "content": "What is 2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def convert(row, **config):
    cfg = SourceConfig(path="x.jsonl", **config)
    return get_format(find_format(row, cfg, "x.jsonl:1")).convert(row, cfg)


def problems(row, **config):
    with pytest.raises(RowError) as caught:
        convert(row, **config)
    return {p.field: (p.found, p.fix) for p in caught.value.problems}


def test_messages_come_out_as_they_are():
    assert convert({"messages": [USER, ANSWER]}) == Conversation((USER, ANSWER))
    assert convert({"conversations": [USER, ANSWER], "id": 7}) == Conversation((USER, ANSWER))


def test_null_means_absent():
    row = {"messages": [{**USER, "tool_calls": None, "name": None}, {**ANSWER, "weight": None}]}
    assert convert({**row, "tools": None, "system": None}) == Conversation((USER, ANSWER))


def test_parts_are_joined_and_thoughts_and_calls_found():
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Look "}, "it up"]},
            {
                "role": "assistant",
                "content": [
                    {"type": "reasoning", "value": "hm"},
                    {"type": "tool_call", "value": '{"name": "find", "arguments": {"q": 1}}'},
                ],
            },
            {"role": "tool", "content": ""},
            {"role": "assistant", "content": "done", "thinking": "so"},
        ]
    }
    call = {"type": "function", "function": {"name": "find", "arguments": {"q": 1}}}
    assert convert(row).messages == (
        {"role": "user", "content": "Look it up"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "done", "reasoning_content": "so"},
    )


@pytest.mark.parametrize("arguments", [{"a": [1, None]}, '{"a": [1, null]}'])
def test_tool_calls_have_their_arguments_as_an_object(arguments):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "7"},
            {**ANSWER, "weight": 0.5},
        ],
        "tools": json.dumps([{"name": "f", "parameters": {}}]),
        "chat_template_kwargs": {"enable_thinking": False},
    }
    made = convert(row)
    assert made.messages[1]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}
    ]
    assert made.messages[1]["content"] == ""
    assert made.messages[3]["weight"] == 0.5
    assert made.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    assert made.template_kwargs == {"enable_thinking": False}


def test_a_system_column_goes_first_and_keeps_the_messages_places():
    assert convert({"system": "Be short.", "messages": [USER, ANSWER]}).messages[0] == {
        "role": "system",
        "content": "Be short.",
    }
    found = problems({"system": "Be short.", "messages": [{**USER, "content": ""}, ANSWER]})
    assert list(found) == ["messages[0].content"]


def test_sharegpt_turns_and_a_call_after_words_is_one_message():
    row = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "let me see"},
            {"from": "function_call", "value": '[{"name": "f", "arguments": {}}]'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": "",
    }
    made = convert(row)
    roles = ["system", "user", "assistant", "tool", "assistant"]
    assert [m["role"] for m in made.messages] == roles
    assert made.messages[2]["content"] == "let me see"
    assert made.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert made.tools == ()


def test_sharegpt_says_where_it_is_wrong():
    turns = [{"from": "humman", "value": "q"}, {"from": "function_call", "value": "{"}, 3]
    row = {"conversations": [{"from": "human", "value": "q"}, *turns]}
    found = problems(row)
    assert found["conversations[1].from"][1] == "did you mean human?"
    assert "no JSON" in found["conversations[2].value"][0]
    assert "conversations[3]" in found


def test_alpaca_with_history_system_and_input():
    row = {
        "instruction": "Add.",
        "input": "1 1",
        "output": "2",
        "system": "s",
        "history": [["hi", "ho"]],
    }
    assert [(m["role"], m["content"]) for m in convert(row).messages] == [
        ("system", "s"),
        ("user", "hi"),
        ("assistant", "ho"),
        ("user", "Add.\n1 1"),
        ("assistant", "2"),
    ]
    row = {"instruction": "Add.", "input": "", "output": ""}
    assert set(problems(row)) == {"output"}
    assert set(problems({**row, "output": "x", "history": [["a"]]})) == {"history[0]"}


def test_prompt_and_completion_as_texts_or_messages():
    assert convert({"prompt": "a ", "completion": "b"}) == Text(prompt="a ", completion="b")
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert [m.get("weight") for m in convert(row).messages] == [None, 0.0, None, None]
    assert set(problems({"prompt": "a", "completion": [ANSWER]})) == {"prompt"}
    assert set(problems({"prompt": "a", "completion": " "})) == {"completion"}
    bad = {"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]}
    assert set(problems(bad)) == {"completion[0].content"}


def test_text():
    assert convert({"text": "once"}) == Text(completion="once")
    assert set(problems({"text": " "})) == {"text"}


def test_fields_map_columns_paths_and_texts():
    row = {"data": {"q": ["zero", "one"]}, "n": 3, "a": "yes", "why": ""}
    fields = {"user": "data.q.1", "assistant": "a", "system": "n is {n}", "reasoning": "why"}
    assert [(m["role"], m["content"]) for m in convert(row, fields=fields).messages] == [
        ("system", "n is 3"),
        ("user", "one"),
        ("assistant", "yes"),
    ]
    assert convert({"story": "s"}, fields={"text": "story"}) == Text(completion="s")
    mapped = convert({"p": "x", "c": "y"}, fields={"prompt": "p", "completion": "c"})
    assert mapped == Text(prompt="x", completion="y")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    made = convert({"dialog": turns, "fns": "[]"}, fields={"messages": "dialog", "tools": "fns"})
    assert [m["role"] for m in made.messages] == ["user", "assistant"]


def test_fields_name_the_column_that_is_wrong():
    fields = {"user": "question", "assistant": "answer"}
    found = problems({"question": "q", "answr": "a"}, fields=fields)
    assert "the row has question, answr" in found["answer"][0]
    assert (
        "wrong type: int 4" in problems({"question": "q", "answer": 4}, fields=fields)["answer"][0]
    )
    with pytest.raises(ValueError, match="makes no sample: name user and assistant"):
        convert({"question": "q"}, fields={"user": "question"})


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [USER, ANSWER], "id": 1}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}]}),
        ("alpaca", {"instruction": "i", "output": "o"}),
        ("prompt_completion", {"prompt": "p", "completion": "c"}),
        ("text", {"text": "a"}),
    ],
)
def test_the_format_is_found(name, row):
    assert find_format(row, CFG, "f:1") == name


def test_where_no_format_or_several_fit_it_is_said():
    row = {"messages": [USER, ANSWER], "text": "a"}
    with pytest.raises(ValueError, match=r"f:1.*fit messages and text.*format: messages"):
        find_format(row, CFG, "f:1")
    assert find_format(row, SourceConfig(path="f", format="text"), "f:1") == "text"
    with pytest.raises(ValueError, match=r"columns \(question, answer\).*map them"):
        find_format({"question": "q", "answer": "a"}, CFG, "f:1")
    with pytest.raises(ValueError, match="preference pairs"):
        find_format({"chosen": "a", "rejected": "b"}, CFG, "f:1")
    labelled = {"messages": [USER, ANSWER], "label": False}
    with pytest.raises(ValueError, match="labelled good or bad"):
        find_format(labelled, CFG, "f:1")
    assert find_format(labelled, SourceConfig(path="f", format="messages"), "f:1") == "messages"
    with pytest.raises(ValueError, match="unknown format 'chatty'"):
        find_format({}, SourceConfig(path="f", format="chatty"), "f:1")
    with pytest.raises(ValueError, match="remove one of the two"):
        find_format({}, SourceConfig(path="f", format="text", fields={"text": "t"}), "f:1")
    for junk in (None, 3, "x", [], {"messages": []}, {"messages": [1]}, {"prompt": 1}):
        assert not any(known.detect(junk) for known in FORMATS.values())


def upper(row, cfg):
    return Text(completion=row["shout"].upper())


OWN = Format(detect=lambda row: True, convert=upper)


def test_a_format_outside_the_tree():
    assert get_format(f"{__name__}:OWN").convert({"shout": "hey"}, CFG) == Text(completion="HEY")
    with pytest.raises(ValueError, match="is function, not a Format"):
        get_format(f"{__name__}:upper")
    with pytest.raises(ValueError, match="cannot be imported"):
        get_format("no.such:THING")


def test_a_misspelled_column_is_no_other_column():
    found = problems({"messages": [USER, ANSWER], "tool": "[]"})
    assert found["tool"][1] == "did you mean tools?"
    assert convert({"messages": [USER, ANSWER], "toll_free": 1})


def test_ignored_keys_are_ignored_and_others_are_not():
    row = {"messages": [{**USER, "date": "now"}, ANSWER]}
    assert set(problems(row)) == {"messages[0].date"}
    assert convert(row, ignore_keys=("date",)) == Conversation((USER, ANSWER))


@pytest.mark.parametrize(
    ("file", "form", "rows", "calls", "results"),
    [
        ("glaive_toolcall_en_demo", "sharegpt", 200, 137, 137),
        ("reason_tool_use", "messages", 30, 48, 30),
        ("kto_en_demo", "messages", 200, 0, 0),
    ],
)
def test_real_files_convert_whole(data_dir, file, form, rows, calls, results):
    path = str(data_dir / "data" / "llama_factory" / f"{file}.jsonl")
    # answers with a label are read where their format is named, but not by chance
    cfg = SourceConfig(path=path, format=form if file == "kto_en_demo" else "auto")
    made = []
    for row in read_rows(cfg):
        assert find_format(row.value, cfg, "here") == form
        made.append(get_format(form).convert(row.value, cfg))
    assert len(made) == rows
    assert sum(len(m.get("tool_calls", ())) for c in made for m in c.messages) == calls
    assert sum(m["role"] == "tool" for c in made for m in c.messages) == results
