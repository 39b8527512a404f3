"""Pairs in the cache: two adjacent examples, both or neither, and what is said of the others."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pytest
from rich.console import Console

from posttrain.chat.config import ChatConfig
from posttrain.chat.template import ChatTemplate
from posttrain.chat.tokenizer import Tokenizer
from posttrain.config import ConfigError
from posttrain.data.cache import Cache
from posttrain.data.prepare import BadRows, prepare
from posttrain.data.report import Report
from tests.data.fakes import FakeChat
from tests.data.prepared import config, write

USER = {"role": "user", "content": "What is 2+2?"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
RESULT = {"role": "tool", "content": "4"}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def pair(question, good, bad):
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "chosen": [said(good)], "rejected": [said(bad)]}


def made(tmp_path, rows, chat=None, **changes):
    source = {"one": {"path": write(tmp_path / "one.jsonl", rows)}}
    cfg = config(tmp_path, sources=source, **changes)
    return prepare(cfg, chat or FakeChat(), kind="pairs", quiet=True)


def texts(cache):
    """What is trained of each example of FakeChat's."""
    examples = (cache[i] for i in range(len(cache)))
    answers = (e.tokens[e.loss_weights > 0].tolist() for e in examples)
    return ["".join(chr(t) for t in answer if t < 256) for answer in answers]


def test_sides_lie_side_by_side_in_the_order_of_the_data(tmp_path):
    rows = [pair(f"q{i}", f"good {i}", f"bad {i}") for i in range(300)]
    cache = made(tmp_path, rows)
    assert cache.sides == 2
    assert texts(cache) == [f"{side} {i}" for i in range(300) for side in ("good", "bad")]
    assert [cache.place(i).split(":")[1] for i in range(4)] == ["1", "1", "2", "2"]
    report = cache.report
    assert report.kind == "pairs"
    assert report.total.examples == 300
    assert report.total.tokens == cache.lengths.sum()
    assert sum(report.histogram) == 600
    assert Report.load(cache.folder / "report.json") == report


def test_texts_have_no_template_and_may_lie_among_conversations(tmp_path, chat_of):
    chat = chat_of()
    cache = made(
        tmp_path, [{"prompt": "2+2=", "chosen": "4", "rejected": "five"}, pair("q", "a", "b")], chat
    )
    end = chat.tokenizer.token(chat.tokenizer.eos_id)
    assert trained_texts(cache, chat)[:2] == [f"4{end}", f"five{end}"]
    assert chat.tokenizer.decode(cache[0].tokens.tolist()).endswith(f"2+2=4{end}")
    assert "assistant" in chat.tokenizer.decode(cache[2].tokens.tolist())


def test_content_is_a_hash_of_the_tokens_and_weights(tmp_path):
    rows = [pair("q", "good", "bad"), pair("p", "yes", "no")]
    cache = made(tmp_path, rows)
    state = hashlib.blake2b(digest_size=16)
    for i in range(4):
        state.update(cache[i].tokens.tobytes() + cache[i].loss_weights.tobytes())
    state.update(cache.lengths.astype("<i4").tobytes())
    assert cache.content == state.hexdigest()
    assert Cache.open(cache.folder).content == cache.content
    # other settings make another cache, of the same content where they do not matter
    longer = made(tmp_path, rows, seq_len=200)
    assert longer.folder != cache.folder
    assert longer.content == cache.content
    assert made(tmp_path, rows[::-1]).content != cache.content


def test_pairs_and_samples_of_one_file_are_two_caches(tmp_path):
    file = write(tmp_path / "one.jsonl", [{"q": "q", "chosen": "4", "rejected": "5"}])
    fields = {"user": "q", "chosen": "chosen", "rejected": "rejected"}
    cfg = config(tmp_path, sources={"one": {"path": file, "fields": fields}})
    both = prepare(cfg, FakeChat(), kind="pairs", quiet=True)
    fields = {"user": "q", "assistant": "chosen"}
    cfg = config(tmp_path, sources={"one": {"path": file, "fields": fields}})
    alone = prepare(cfg, FakeChat(), quiet=True)
    assert (both.sides, len(both), alone.sides, len(alone)) == (2, 2, 1, 1)
    with pytest.raises(ValueError, match=r"data.sources.one: .*fields: \{user, assistant\} makes"):
        prepare(cfg, FakeChat(), kind="pairs", quiet=True)


@pytest.mark.parametrize(
    ("how", "kept", "dropped"),
    [
        ("drop", ["a", "b"], {"longer than seq_len": 3}),
        (
            "truncate_end",
            ["a", "b", "x" * 17, "n", "a", "b"],
            {
                "the sides are equal after truncate_end": 1,
                "no trained token left on a side after truncate_end": 1,
            },
        ),
        (
            "truncate_start",
            ["a", "b", "a", "b"],
            {"the answer alone is over seq_len": 2},
        ),
    ],
)
def test_a_long_side_takes_the_other_with_it(tmp_path, how, kept, dropped):
    rows = [
        pair("q", "a", "b"),
        pair("q", "x" * 30, "n"),
        pair("q", "x" * 30 + "1", "x" * 30 + "2"),
        pair("long question, over 20 tokens", "a", "b"),
    ]
    if how == "truncate_end":
        rows.append(pair("short enough, 16", "a", "b"))
    cache = made(tmp_path, rows, too_long=how, seq_len=20)
    assert texts(cache) == kept
    report = cache.report.total
    assert dict(report.dropped) == dropped
    assert report.examples + report.dropped.total() == len(rows)
    assert report.truncated == (how != "drop")
    lost = {"drop": 0, "truncate_end": 14, "truncate_start": 26}[how]
    assert report.cut_tokens == lost
    assert report.cut_trained == (lost if how == "truncate_end" else 0)
    if how == "truncate_start":  # the same end of the question stands before both answers
        chosen, rejected = (cache[i].tokens.tolist() for i in (2, 3))
        assert chosen[:-2] == rejected[:-2] == [256, *b"on, over 20 tokens"[-16:], 257]


def test_the_report_speaks_of_pairs(tmp_path):
    rows = [pair("q", "a" * 60, "b" * 61), pair("q", "a", "b"), pair("q", "a" * 200, "b")]
    cache = made(tmp_path, [*rows, pair("q", "a", "b")], too_long="truncate_end")
    report = cache.report
    assert report.total.pairs_in_row == 2
    assert report.losses() == [
        "one: 1 pairs over 128 tokens cut (truncate_end): 76 tokens lost, 76 of them trained"
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    report.show(console)
    shown = console.export_text()
    assert "50.0% of the pairs fit a row of 128 with both sides" in shown
    assert "tokens a pair" in shown
    assert "examples" not in shown


def test_errors_of_pairs_come_all_at_once(tmp_path):
    rows = [pair("q", "a", "b"), pair("q", "a", "a"), pair("q", "a", "b" * 200)]
    with pytest.raises(BadRows) as caught:
        made(tmp_path, rows, too_long="error")
    assert "2 of 3 rows are bad" in str(caught.value)
    assert "one.jsonl:2: rejected: the same as chosen" in str(caught.value)
    assert "one.jsonl:3: rejected: 204 tokens, over data.seq_len (128)" in str(caught.value)
    cache = made(tmp_path, rows[:2], on_bad_row="skip")
    assert (len(cache), cache.report.total.bad_rows) == (2, 1)
    with pytest.raises(ConfigError, match=r"too_long: split: a pair has two whole answers"):
        made(tmp_path, rows, too_long="split")
    with pytest.raises(ValueError, match="no pair left of 1 rows"):
        made(tmp_path, rows[2:], too_long="drop")


def test_workers_make_the_same_cache(tmp_path):
    rows = [pair(f"q{i}", "good " * (i % 9), f"bad {i}") for i in range(1, 2000)]
    alone = made(tmp_path, rows, on_bad_row="skip")
    together = made(
        tmp_path, rows, on_bad_row="skip", workers=1, cache_dir=str(tmp_path / "second")
    )
    assert alone.content == together.content
    assert alone.report.sources == together.report.sources


@pytest.fixture(scope="module")
def chat_of(data_dir):
    folder = data_dir / "data/tokenizers/minimind"
    tokenizer = Tokenizer.load(folder)

    def load(**settings):
        return ChatTemplate.load(folder, tokenizer, ChatConfig(**{"template": "chatml"} | settings))

    return load


def trained_texts(cache, chat):
    out = []
    for i in range(len(cache)):
        example = cache[i]
        out.append(chat.tokenizer.decode(example.tokens[example.loss_weights > 0].tolist()))
    return out


def test_only_answers_are_trained_whatever_train_on_says(tmp_path, chat_of):
    """The prompt's own answers are context; `last` means the last message of an answer."""
    row = {
        "prompt": [USER, said("4"), USER],
        "chosen": [CALLS, RESULT, said("good", weight=1)],
        "rejected": [said("bad")],
    }
    chat = chat_of(template=None, train_on="last")
    cache = made(tmp_path, [row], chat)
    assert [text.split("<|im_end|>")[0].strip() for text in trained_texts(cache, chat)] == [
        "good",
        "bad",
    ]
    assert set(cache[0].loss_weights.tolist()) == {0, 1}
    assert cache.report.total.prompts_differ == 0  # it cannot be told
    chat = chat_of(template=None, train_on="all")
    cache = made(tmp_path, [row], chat)
    called, bad = trained_texts(cache, chat)
    assert '"f"' in called
    assert "good" in called
    assert "4" not in called
    assert bad.startswith("bad")


BY_LENGTH = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' of ' ~ messages|length if loop.first }}\n"
    "{{ m.content }}{% if m.tool_calls %}calls {{ m.tool_calls[0].function.name }}"
    "{{ m.tool_calls[0].function.arguments|tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_prompt_that_the_template_renders_by_what_follows_is_said(tmp_path, chat_of):
    template = tmp_path / "by_length.jinja"
    template.write_text(BY_LENGTH)
    chat = chat_of(template=str(template))
    several = {"prompt": [USER], "chosen": [CALLS, RESULT, said("4")], "rejected": [said("5")]}
    rows = [several, pair("What is 2+2?", "4", "5")]
    cache = made(tmp_path, rows, chat)
    assert len(cache) == 4
    assert cache.report.total.prompts_differ == 1
    (line,) = cache.report.losses()
    assert line.startswith("one: 1 pairs whose prompt the template renders differently")


def test_answers_that_part_before_what_is_trained_are_no_such_prompts(tmp_path, data_dir, chat_of):
    """Calls under train_on: last, and untrained thinking, are the answers' own."""
    call = {"name": "f", "arguments": {"a": 1}}
    called = [
        [{**CALLS, "tool_calls": c}, RESULT, said("4")] for c in ([call], CALLS["tool_calls"])
    ]
    row = {"prompt": [USER], "chosen": called[0], "rejected": [*called[1][:2], said("5")]}
    cache = made(tmp_path, [row], chat_of(train_on="last"))
    assert (len(cache), cache.report.total.prompts_differ) == (2, 0)
    thoughts = [[said(text, reasoning_content=f"so {text}")] for text in "45"]
    row = {"prompt": [USER], "chosen": thoughts[0], "rejected": thoughts[1]}
    cache = made(tmp_path, [row], qwen3(tmp_path, data_dir, chat_of, train_thinking=False))
    assert (len(cache), cache.report.total.prompts_differ) == (2, 0)


def qwen3(tmp_path, data_dir, chat_of, **settings):
    lines = (data_dir / "data/chat_templates.jsonl").read_text(encoding="utf-8").splitlines()
    templates = {row["name"]: row["chat_template"] for row in map(json.loads, lines)}
    (tmp_path / "qwen3.jinja").write_text(templates["trl__qwen3"], encoding="utf-8")
    return chat_of(template=str(tmp_path / "qwen3.jinja"), **settings)


def test_an_answer_that_becomes_several_examples_is_refused(tmp_path, data_dir, chat_of):
    """A template that drops earlier thinking splits a conversation: a side must be one example."""
    thoughts = [said("a", reasoning_content="so"), USER, said("b", reasoning_content="then")]
    row = {"prompt": [USER], "chosen": thoughts, "rejected": [said("c")]}
    chat = qwen3(tmp_path, data_dir, chat_of)
    with pytest.raises(BadRows, match="chosen: the template makes 2 examples of it"):
        made(tmp_path, [row], chat)
    once = {"prompt": [USER], "chosen": thoughts[:1], "rejected": [said("c")]}
    assert len(made(tmp_path, [once], chat)) == 2


def test_an_answer_that_differs_in_what_the_template_drops_is_refused(tmp_path, chat_of):
    row = pair("q", "same", "same")
    row["rejected"][0]["name"] = "bot"  # chatml writes no names
    with pytest.raises(BadRows, match="rejected: the tokens of chosen: the pair teaches nothing"):
        made(tmp_path, [row], chat_of())


@pytest.mark.parametrize(
    ("files", "bad", "pairs"),
    [("hh_rlhf/*.jsonl", 4, 1308), ("llama_factory/dpo_en_demo.jsonl", 0, 200)],
)
def test_real_pairs_share_their_prompt_token_for_token(
    tmp_path, data_dir, chat_of, files, bad, pairs
):
    source = {"real": {"path": str(data_dir / "data" / files)}}
    cfg = config(tmp_path, sources=source, on_bad_row="skip", seq_len=8192, too_long="error")
    cache = prepare(cfg, chat_of(), kind="pairs", quiet=True)
    report = cache.report.total
    assert (report.bad_rows, report.examples, len(cache)) == (bad, pairs, 2 * pairs)
    assert (report.prompts_differ, report.dropped) == (0, {})
    for p in range(pairs):
        chosen, rejected = cache.read([2 * p, 2 * p + 1])
        start = int(np.argmax(chosen.loss_weights > 0))
        assert start == int(np.argmax(rejected.loss_weights > 0)) > 0
        assert chosen.tokens[:start].tolist() == rejected.tokens[:start].tolist()
        assert chosen.tokens.tolist() != rejected.tokens.tolist()
