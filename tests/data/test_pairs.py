"""Rows as people have them become pairs: the same prompt on both sides, only answers trained."""

from __future__ import annotations

import json

import pytest

from posttrain.data.config import SourceConfig
from posttrain.data.formats import (
    FORMATS,
    find_format,
    get_format,
    hh,
    llama_factory,
    preference,
    ultrafeedback,
)
from posttrain.data.rows import RowError
from posttrain.types import Conversation, Pair, Text
from tests.data.rows import read_rows

USER = {"role": "user", "content": "What is 2+2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be short."}
BEFORE = {**GOOD, "weight": 0.0}
TEXT = USER["content"]
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4"}


def convert(row, **config):
    cfg = SourceConfig(path="x.jsonl", **config)
    return get_format(find_format(row, cfg, "x.jsonl:1", kind="pairs")).convert(row, cfg)


def pair(*prompt):
    return Pair(Conversation((*prompt, GOOD)), Conversation((*prompt, BAD)))


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def said(text):
    return {"from": "gpt", "value": text}


def rated(*scores, key="overall_score", **more):
    answers = [{"response": f"answer {i}", key: s, **more} for i, s in enumerate(scores)]
    return {"source": "x", "instruction": TEXT, "completions": answers}


def test_every_format_of_pairs_is_in_this_file():
    ours = {preference.FORMAT, hh.FORMAT, llama_factory.FORMAT, ultrafeedback.FORMAT}
    assert {known for known in FORMATS.values() if known.kind == "pairs"} == ours


@pytest.mark.parametrize(
    ("form", "row", "made"),
    [
        (
            "preference",
            {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
            Pair(Text("4", "2+2="), Text("5", "2+2=")),
        ),
        ("preference", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, pair(USER)),
        ("preference", {"prompt": [USER], "chosen": "4", "rejected": "5"}, pair(USER)),
        ("preference", {"prompt": TEXT, "chosen": [GOOD], "rejected": [BAD]}, pair(USER)),
        (
            "preference",
            {"prompt": [USER, GOOD, USER], "chosen": [GOOD], "rejected": [BAD]},
            pair(USER, BEFORE, USER),
        ),
        (
            "preference",
            {"chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt_id": "x"},
            pair(USER),
        ),
        (
            "preference",
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            pair(USER, BEFORE, USER),
        ),
        (  # Parquet writes nulls, and not always the same ones
            "preference",
            {"chosen": [{**USER, "name": None}, GOOD], "rejected": [USER, BAD]},
            pair(USER),
        ),
        # ultrafeedback_binarized, Tulu
        (
            "preference",
            {"prompt": f"{TEXT}\n", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            pair(USER),
        ),
        (
            "preference",
            {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            pair(USER),
        ),
        (
            "preference",
            {"system": "Be short.", "prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            pair(SYSTEM, USER),
        ),
        (
            "hh",
            {
                "chosen": f"\n\nHuman: {TEXT} \n\nAssistant: 4\n\nHuman: {TEXT}\n\nAssistant:  4 ",
                "rejected": f"\n\nHuman: {TEXT} \n\nAssistant: 4\n\nHuman: {TEXT}\n\nAssistant: 5",
            },
            pair(USER, BEFORE, USER),
        ),
        (
            "hh",
            {"prompt": f"\n\nHuman: {TEXT}\n\nAssistant:", "chosen": " 4", "rejected": " 5"},
            pair(USER),
        ),
        (
            "llama_factory",
            {"conversations": turns(TEXT), "chosen": said("4"), "rejected": said("5")},
            pair(USER),
        ),
        (
            "llama_factory",
            {
                "conversations": [
                    {"from": "system", "value": "Be short."},
                    *turns(TEXT, "4", TEXT),
                ],
                "chosen": said("4"),
                "rejected": said("5"),
            },
            pair(SYSTEM, USER, BEFORE, USER),
        ),
        ("llama_factory", {"messages": [USER], "chosen": GOOD, "rejected": BAD}, pair(USER)),
        (
            "llama_factory",
            {
                "instruction": "What is",
                "input": "2+2?",
                "system": "Be short.",
                "history": [[TEXT, "4"]],
                "chosen": "4",
                "rejected": "5",
            },
            pair(SYSTEM, USER, BEFORE, {**USER, "content": "What is\n2+2?"}),
        ),
        (
            "ultrafeedback",
            rated(3.0, 7.5, 2, "2.0"),
            Pair(
                Conversation((USER, {**GOOD, "content": "answer 1"})),
                Conversation((USER, {**GOOD, "content": "answer 2"})),
            ),
        ),
        (
            "ultrafeedback",
            rated(1, 2, key="fine-grained_score", overall_score=None),
            Pair(
                Conversation((USER, {**GOOD, "content": "answer 1"})),
                Conversation((USER, {**GOOD, "content": "answer 0"})),
            ),
        ),
    ],
)
def test_a_row_is_recognised_and_becomes_a_pair(form, row, made):
    assert find_format(row, SourceConfig(path="x"), "f:1", kind="pairs") == form
    assert convert({**row, "id": 7}) == made


@pytest.mark.parametrize(
    ("row", "fields", "made"),
    [
        (
            {"system": "Be short.", "question": TEXT, "good": "4", "bad": "5"},
            {"system": "system", "prompt": "question", "chosen": "good", "rejected": "bad"},
            pair(SYSTEM, USER),
        ),
        (  # what is templated does not hang on one row's system text
            {"system": "", "question": TEXT, "good": "4", "bad": "5"},
            {"system": "system", "prompt": "question", "chosen": "good", "rejected": "bad"},
            pair(USER),
        ),
        (
            {"question": TEXT, "good": "4", "bad": "5"},
            {"user": "question", "chosen": "good", "rejected": "bad"},
            pair(USER),
        ),
        (
            {"question": TEXT, "good": "4", "bad": "5"},
            {"prompt": "question", "chosen": "good", "rejected": "bad"},
            Pair(Text("4", TEXT), Text("5", TEXT)),
        ),
        (
            {"good": [USER, GOOD], "bad": [USER, BAD]},
            {"chosen": "good", "rejected": "bad"},
            pair(USER),
        ),
        (
            {
                "good": f"\n\nHuman: {TEXT}\n\nAssistant: 4",
                "bad": f"\n\nHuman: {TEXT}\n\nAssistant: 5",
            },
            {"chosen": "good", "rejected": "bad"},
            pair(USER),
        ),
    ],
)
def test_fields_map_pairs(row, fields, made):
    assert convert(row, fields=fields) == made
    assert convert(row, fields=fields, format="fields") == made


def test_fields_name_the_columns_of_a_pair():
    fields = {"user": "q", "chosen": "good", "rejected": "bad"}
    for row, field in (
        ({"q": "", "good": "4", "bad": "5"}, "q"),
        ({"q": "q", "good": "", "bad": "5"}, "good"),
    ):
        with pytest.raises(RowError) as caught:
            convert(row, fields=fields)
        assert [p.field for p in caught.value.problems] == [field]
    with pytest.raises(ValueError, match=r"makes no sample: .* for pairs user, chosen"):
        convert({"a": 1}, fields={"messages": "a", "chosen": "a", "rejected": "a"})


def test_answers_of_several_messages_and_tools():
    tools = [{"name": "add", "parameters": {}}]
    row = {"prompt": [USER], "chosen": [CALLS, RESULT, GOOD], "rejected": [BAD], "tools": tools}
    made = convert(row)
    assert made.chosen.messages == (USER, CALLS, RESULT, GOOD)
    assert made.rejected.messages == (USER, BAD)
    assert made.chosen.tools == made.rejected.tools != ()
    shared = {"chosen": [USER, CALLS, RESULT, GOOD], "rejected": [USER, CALLS, RESULT, BAD]}
    assert convert(shared) == pair(USER, {**CALLS, "weight": 0.0}, RESULT)
    called = {
        "conversations": turns(TEXT),
        "chosen": {"from": "function_call", "value": json.dumps(CALL["function"])},
    }
    made = convert({**called, "rejected": said("5"), "tools": json.dumps(tools)})
    assert made.chosen.messages[1]["tool_calls"][0]["function"] == CALL["function"]


def test_each_job_takes_its_own_kind_and_says_where_the_other_goes():
    pairs, sample = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"messages": [USER, GOOD]}
    cfg = SourceConfig(path="f")
    for row in (pairs, rated(1, 2), {"chosen": "a", "rejected": "b"}):
        with pytest.raises(ValueError, match=r"f:1: preference pairs.*`posttrain preference`"):
            find_format(row, cfg, "f:1")
    with pytest.raises(ValueError, match=r"f:1: samples to imitate.*`posttrain sft`"):
        find_format(sample, cfg, "f:1", kind="pairs")
    with pytest.raises(
        ValueError, match=r"columns \(question, good\).*fields: \{user: question, chosen"
    ):
        find_format({"question": "a", "good": "b"}, cfg, "f:1", kind="pairs")
    with pytest.raises(ValueError, match=r"answers without what they answer.*{user: question"):
        find_format({"chosen": "a", "rejected": "b"}, cfg, "f:1", kind="pairs")
    with pytest.raises(ValueError, match=r"format: messages makes samples.*preference, hh"):
        find_format(pairs, SourceConfig(path="f", format="messages"), "f:1", kind="pairs")
    with pytest.raises(ValueError, match=r"format: hh makes pairs.*messages, sharegpt"):
        find_format(pairs, SourceConfig(path="f", format="hh"), "f:1")
    for prompt, side in ((USER, GOOD), (TEXT, None)):
        row = {"prompt": prompt, "chosen": side, "rejected": GOOD}
        with pytest.raises(ValueError, match=r"chosen is .* and rejected is an object with 'role'"):
            find_format(row, cfg, "f:1", kind="pairs")
    as_sample = SourceConfig(path="f", fields={"messages": "chosen"})
    assert find_format(pairs, as_sample, "f:1") == "fields"
    with pytest.raises(ValueError, match=r"fields: {messages} makes samples"):
        find_format(pairs, as_sample, "f:1", kind="pairs")
    as_pair = SourceConfig(path="f", fields={"chosen": "chosen", "rejected": "rejected"})
    with pytest.raises(ValueError, match=r"fields: {chosen, rejected} makes pairs"):
        find_format(pairs, as_pair, "f:1")


@pytest.mark.parametrize(
    ("file", "form", "rows", "bad"),
    [
        ("hh_rlhf/harmless_base_test_part_train", "hh", 1000, {87: 3, 517: 1, 926: 1}),
        ("hh_rlhf/harmless_base_test_part_eval", "hh", 312, {104: 1}),
        ("llama_factory/dpo_en_demo", "llama_factory", 200, {}),
    ],
)
def test_real_files_convert_whole(data_dir, file, form, rows, bad):
    """Every row, but those whose chosen answer is empty (bad: line -> the turn)."""
    cfg = SourceConfig(path=str(data_dir / "data" / f"{file}.jsonl"))
    seen, empty = 0, {}
    for row in read_rows(cfg):
        seen += 1
        assert find_format(row.value, cfg, "here", kind="pairs") == form
        try:
            made = get_format(form).convert(row.value, cfg)
        except RowError as error:
            (problem,) = error.problems
            assert problem.found == 'empty answer ""'
            empty[row.line] = int(problem.field.removeprefix("chosen[").removesuffix("].content"))
            continue
        chosen, rejected = made.chosen.messages, made.rejected.messages
        shared = sum(m.get("weight") == 0 or m["role"] != "assistant" for m in rejected)
        assert chosen[:shared] == rejected[:shared]
        assert chosen[shared - 1]["role"] == "user"
        assert chosen[shared] != rejected[shared]
        if (
            form == "hh"
        ):  # an answer is the end of its transcript, and so is the prompt its beginning
            for side, messages in (("chosen", chosen), ("rejected", rejected)):
                texts = [m["content"] for m in messages]
                names = {"user": "Human", "assistant": "Assistant"}
                heads = [f"{names[m['role']]}:" for m in messages]
                whole = "".join(row.value[side].split())
                assert whole == "".join(
                    "".join(h + t for h, t in zip(heads, texts, strict=True)).split()
                )
    assert (seen, empty) == (rows, bad)
