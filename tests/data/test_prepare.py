"""What prepare makes of sources (tokenise.py works block by block): examples, report, key."""

from __future__ import annotations

import gzip
import json
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from posttrain.chat.config import ChatConfig
from posttrain.chat.template import ChatTemplate
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data import progress, sources
from posttrain.data.prepare import BadRows, prepare
from posttrain.data.report import Report
from posttrain.types import Text
from tests.data.fakes import FakeChat
from tests.data.prepared import assert_same, config, expected, turn, write


def test_the_cache_holds_what_the_template_makes(tmp_path):
    rows = [turn(i) for i in range(40)]
    cache = prepare(config(tmp_path, rows), FakeChat(), quiet=True)
    assert_same(cache, expected(rows))
    assert cache.place(7) == f"{tmp_path}/one.jsonl:8"


def test_sources_keep_their_names_order_and_formats(tmp_path):
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]
    parts = {
        "talk": {"path": write(tmp_path / "a.jsonl", [{"messages": messages}] * 3)},
        "prose": {"path": write(tmp_path / "b.jsonl", [{"text": "once"}] * 2)},
        "asked": {"path": write(tmp_path / "c.jsonl", [{"prompt": "p", "completion": "c"}])},
    }
    cache = prepare(config(tmp_path, sources=parts), FakeChat(), quiet=True)
    assert cache.source_names == ["talk", "prose", "asked"]
    assert cache.source_ids.tolist() == [0, 0, 0, 1, 1, 2]
    wanted = FakeChat().text_example(Text(prompt="p", completion="c"))
    assert cache[5].loss_weights.tolist() == wanted.loss_weights.tolist()
    assert {name: s.examples for name, s in cache.report.sources.items()} == {
        "talk": 3,
        "prose": 2,
        "asked": 1,
    }


@pytest.mark.parametrize("name", ["", "a/b", "../up", " x"])
def test_a_name_that_is_no_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is no name for a source"):
        config(tmp_path, sources={name: {"path": "x.jsonl"}})


@pytest.mark.parametrize(
    ("rows", "said"),
    [(None, "no such file"), ([], "no example left"), ([{"x": 1}], "no format recognises")],
)
def test_errors_name_the_place_in_the_config(tmp_path, rows, said):
    path = str(tmp_path / "x.jsonl") if rows is None else write(tmp_path / "x.jsonl", rows)
    cfg = config(tmp_path, sources={"mine": {"path": path}})
    with pytest.raises(ValueError, match=rf"^data\.sources\.mine.*{said}"):
        prepare(cfg, FakeChat(), quiet=True)
    with pytest.raises(ValueError, match=rf"^eval\.sets\.mine.*{said}"):
        prepare(cfg, FakeChat(), quiet=True, section="eval.sets")


def test_a_users_format_that_is_not_there_is_an_error_of_the_config(tmp_path):
    path = write(tmp_path / "x.jsonl", [turn(0)])
    cfg = config(tmp_path, sources={"mine": {"path": path, "format": "no_such_package.rows:OWN"}})
    with pytest.raises(ValueError, match=r"no_such_package\.rows:OWN': cannot be imported"):
        prepare(cfg, FakeChat(), quiet=True)


def test_without_a_home_the_cache_must_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as of a user without a home
    with pytest.raises(ValueError, match=r"data\.cache_dir: ~/c: this user has no home"):
        prepare(config(tmp_path, [turn(0)], cache_dir="~/c"), FakeChat(), quiet=True)


# ---- too long


@pytest.mark.parametrize(
    ("how", "counted"),
    [
        ("truncate_end", {"truncated": 1, "cut_tokens": 73, "cut_trained": 73, "examples": 3}),
        ("truncate_start", {"truncated": 1, "cut_tokens": 73, "cut_trained": 63, "examples": 3}),
        ("split", {"split": 1, "pieces": 4, "examples": 6}),
        ("drop", {"dropped": {"longer than seq_len": 1}, "examples": 2}),
    ],
)
def test_what_is_too_long_is_counted(tmp_path, how, counted):
    rows = [turn(1, "ok"), {"q": "q" * 10, "a": "a" * 92}, turn(2, "ok")]  # 15, 105, 15 tokens
    cfg = config(tmp_path, rows, too_long=how, seq_len=32)
    cache = prepare(cfg, FakeChat(), quiet=True)
    source = cache.report.sources["one"]
    assert {name: getattr(source, name) for name in counted} == counted
    assert source.rows == 3
    assert cache.lengths.max() <= 32
    assert len(cache) == source.examples == len(cache.lengths)
    assert (source.tokens, source.trained) == (cache.lengths.sum(), cache.trained.sum())
    assert any("one: 1" in line for line in cache.report.losses())


def test_truncated_to_nothing_is_dropped_with_its_reason(tmp_path):
    rows = [turn(1, "ok"), {"q": "q" * 40, "a": "a"}]
    cache = prepare(config(tmp_path, rows, seq_len=32), FakeChat(), quiet=True)
    source = cache.report.sources["one"]
    assert source.dropped == {"no trained token left after truncate_end": 1}
    assert (source.truncated, len(cache)) == (0, 1)
    assert cache.report.losses() == ["one: 1 dropped: no trained token left after truncate_end"]


def test_too_long_can_be_an_error_whatever_becomes_of_bad_rows(tmp_path):
    rows = [turn(1, "ok"), {"q": "q", "a": "a" * 60}, {"q": "q"}, {"q": "q" * 50, "a": "a"}]
    cfg = config(tmp_path, rows, seq_len=32, too_long="error", on_bad_row="skip")
    with pytest.raises(BadRows) as caught:
        prepare(cfg, FakeChat(), quiet=True)
    assert [(d.line, d.found) for d in caught.value.defects] == [
        (2, "64 tokens, over data.seq_len (32)"),
        (4, "54 tokens, over data.seq_len (32)"),
    ]
    assert not list(Path(cfg.cache_dir).glob("*/index.json"))
    assert "on_bad_row" not in str(caught.value), "it would not help"


def test_many_too_long_rows_are_summed_up_as_one_kind(tmp_path):
    rows = [{"q": "q", "a": "a" * (60 + i)} for i in range(60)]
    with pytest.raises(BadRows, match=r"and 10 more \(60 x over data\.seq_len\)"):
        prepare(config(tmp_path, rows, seq_len=32, too_long="error"), FakeChat(), quiet=True)


# ---- bad rows


def test_all_bad_rows_are_reported_at_once_and_nothing_is_cached(tmp_path):
    rows = [turn(i) for i in range(200)]
    rows[3] = {"q": ""}
    rows[50] = {"q": "refuse me", "a": "a"}
    cfg = config(tmp_path, rows)
    with pytest.raises(BadRows) as caught:
        prepare(cfg, FakeChat(), quiet=True)
    file = cfg.sources["one"].path
    assert [(d.file, d.line, d.field) for d in caught.value.defects] == [
        (file, 4, "a"),
        (file, 51, "row"),
    ]
    assert str(caught.value).startswith("2 of 200 rows are bad:\n")
    assert f"{file}:4: a: missing field" in str(caught.value)
    assert "on_bad_row: skip" in str(caught.value)
    assert [path.name for path in Path(cfg.cache_dir).iterdir()] == []


def test_an_error_does_not_grow_with_the_data(tmp_path):
    with pytest.raises(BadRows) as caught:
        prepare(config(tmp_path, [{"q": "x"}] * 500), FakeChat(), quiet=True)
    assert len(caught.value.defects) == 500
    assert len(str(caught.value).splitlines()) < 60
    assert "and 450 more (500 x missing field" in str(caught.value)


def test_skipped_rows_are_counted_and_said(tmp_path):
    rows = [turn(1), {"q": "x"}, turn(2), {"q": "y"}]
    cache = prepare(config(tmp_path, rows, on_bad_row="skip"), FakeChat(), quiet=True)
    assert_same(cache, expected([rows[0], rows[2]]))
    assert cache.report.losses() == ["one: 2 bad rows skipped"]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "no example left of 0 rows"),
        ([{"q": "x"}], r"no example left of 1 rows \(1 bad\)"),
        ([{"q": "q" * 200, "a": "a"}], "1 dropped: no trained token left"),
    ],
)
def test_a_source_of_which_nothing_is_left_is_an_error(tmp_path, rows, match):
    with pytest.raises(ValueError, match=match):
        prepare(config(tmp_path, rows, on_bad_row="skip"), FakeChat(), quiet=True)


# ---- the key


def test_the_same_data_is_not_prepared_again(tmp_path, capsys):
    class Once(FakeChat):
        def examples_batch(self, conversations):
            raise AssertionError("tokenised again")

    cfg = config(tmp_path, [turn(i) for i in range(20)])
    first = prepare(cfg, FakeChat())
    said = capsys.readouterr().out
    again = prepare(cfg, Once())
    assert again.folder == first.folder
    assert capsys.readouterr().out == said
    moved = tmp_path / "moved.jsonl"
    Path(cfg.sources["one"].path).rename(moved)
    one = cfg.sources["one"].model_copy(update={"path": str(moved), "weight": 2.0, "repeats": 3})
    elsewhere = cfg.model_copy(update={"sources": {"one": one}, "workers": 2, "wait_minutes": 1})
    assert prepare(elsewhere, Once(), quiet=True).folder == first.folder


def test_whatever_changes_the_examples_changes_the_key(tmp_path):
    rows = [turn(i) for i in range(20)]
    cfg = config(tmp_path, rows)
    keys = [prepare(cfg, FakeChat(), quiet=True).fingerprint]
    keys.append(prepare(cfg, FakeChat("other"), quiet=True).fingerprint)
    for change in ({"seq_len": 64}, {"too_long": "drop"}, {"on_bad_row": "skip"}):
        keys.append(prepare(cfg.model_copy(update=change), FakeChat(), quiet=True).fingerprint)
    for change in ({"limit": 3}, {"fields": {"user": "a", "assistant": "q"}}):
        one = {"one": cfg.sources["one"].model_copy(update=change)}
        changed = cfg.model_copy(update={"sources": one})
        keys.append(prepare(changed, FakeChat(), quiet=True).fingerprint)
    renamed = cfg.model_copy(update={"sources": {"two": cfg.sources["one"]}})
    keys.append(prepare(renamed, FakeChat(), quiet=True).fingerprint)
    # the same size at the same place, a moment later
    rows[0]["a"] = rows[0]["a"].replace("answer", "ANSWER")
    keys.append(prepare(config(tmp_path, rows), FakeChat(), quiet=True).fingerprint)
    assert len(set(keys)) == len(keys)


def test_an_edited_format_of_the_users_own_changes_the_key(tmp_path, monkeypatch):
    module = tmp_path / "own_format.py"
    text = """
from posttrain.data.formats import Format
from posttrain.types import Text
FORMAT = Format(lambda row: True, lambda row, cfg: Text(completion=row["q"]))
"""
    module.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path / "one.jsonl", [turn(1)])
    cfg = config(tmp_path, sources={"one": {"path": path, "format": "own_format:FORMAT"}})
    first = prepare(cfg, FakeChat(), quiet=True)
    assert first[0].tokens.tolist() == [256, *b"question 1", 257]
    module.write_text(text + "# edited\n")
    assert prepare(cfg, FakeChat(), quiet=True).fingerprint != first.fingerprint


def test_digests_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    from posttrain.data import fingerprint

    cfg = config(tmp_path, [turn(i) for i in range(20)])
    file = cfg.sources["one"].path
    calls = []
    real = sources.digest
    monkeypatch.setattr(fingerprint, "digest", lambda f: calls.append(f) or real(f))
    monkeypatch.setattr(fingerprint, "_SETTLED", 0.0)
    time.sleep(0.05)
    key = fingerprint.fingerprint(cfg, FakeChat(), {"one": [file]})
    assert fingerprint.fingerprint(cfg, FakeChat(), {"one": [file]}) == key
    assert calls == [file]
    stat = os.stat(file)
    Path(file).write_bytes(Path(file).read_bytes().replace(b"question 0", b"QUESTION 0"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy that keeps times does
    assert fingerprint.fingerprint(cfg, FakeChat(), {"one": [file]}) != key


# ---- what is shown


def test_the_report_is_shown_and_kept(tmp_path, capsys):
    rows = [turn(i) for i in range(30)] + [{"q": "q", "a": "a" * 200}]
    cfg = config(tmp_path, rows)
    cache = prepare(cfg, FakeChat())
    said = capsys.readouterr().out
    report = Report.load(cache.folder / "report.json")
    assert report == cache.report
    total = report.total
    assert (total.tokens, total.trained) == (cache.lengths.sum(), cache.trained.sum())
    for number in (total.rows, total.tokens, total.trained):
        assert f"{number:,}" in said
    assert "one: 1 examples over 128 tokens cut (truncate_end): 76 tokens lost" in said
    lengths = [len(e.tokens) for e in expected(rows)]
    edges = [0, *report.edges, 10**9]
    assert report.histogram == [
        sum(low < n <= high for n in lengths) for low, high in pairwise(edges)
    ]
    saved = json.loads((cache.folder / "report.json").read_text())
    assert saved["tokens_per_second"] == pytest.approx(total.tokens / report.seconds)


def test_without_a_terminal_progress_is_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 500)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    rows = [turn(i) for i in range(100)]
    cfg = config(tmp_path, rows)
    data = Path(cfg.sources["one"].path)
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(data.read_bytes()))
    two = cfg.sources["one"].model_copy(update={"path": str(tmp_path / "two.jsonl.gz")})
    cfg = cfg.model_copy(update={"sources": {**cfg.sources, "two": two}})
    prepare(cfg, FakeChat())
    lines = capsys.readouterr().err.splitlines()
    shares = [int(line.split()[1].rstrip("%")) for line in lines]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert "200 examples" in lines[-1]
    assert "tokens/s, 0 s left" in lines[-1]


def test_real_rows_with_a_real_template(tmp_path, data_dir):
    """What is trained of gsm8k is the answer and the stop, through a model's own template."""
    folder = data_dir / "data" / "tokenizers" / "minimind"
    file = data_dir / "data" / "gsm8k" / "train.jsonl"
    tokenizer = Tokenizer.load(folder)
    source = {"path": str(file), "fields": {"user": "question", "assistant": "answer"}}
    cfg = config(tmp_path, sources={"gsm8k": {**source, "limit": 300}}, seq_len=1024, workers=1)
    cache = prepare(cfg, ChatTemplate.load(folder, tokenizer, ChatConfig()), quiet=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()[:300]]
    for i, row in enumerate(rows):
        example = cache[i]
        answer = tokenizer.decode(example.tokens[example.loss_weights > 0].tolist())
        assert answer == row["answer"].strip() + "<|im_end|>"
        assert row["question"] in tokenizer.decode(example.tokens.tolist())
