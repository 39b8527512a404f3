"""By how much a chosen answer is better: from a column of the rows to the segments of a batch."""

from __future__ import annotations

import json

import numpy as np
import pytest

from posttrain.data.pipeline import make_rows, pair_numbers
from posttrain.data.prepare import BadRows, prepare
from tests.data.fakes import FakeChat
from tests.data.prepared import config, write


def row(question, **columns):
    prompt = [{"role": "user", "content": question}]
    sides = {
        side: [{"role": "assistant", "content": f"{side} {question}"}]
        for side in ("chosen", "rejected")
    }
    return {"prompt": prompt, **sides, **columns}


def made(tmp_path, rows, changes=None, **source):
    """The cache of these rows, prepared as pairs."""
    source = {"one": {"path": write(tmp_path / "one.jsonl", rows), **source}}
    cfg = config(tmp_path, sources=source, **(changes or {}))
    return prepare(cfg, FakeChat(), kind="pairs", quiet=True)


def margins(cache):
    return [example.margin for example in cache.read(range(len(cache)))]


def test_the_column_margin_is_on_both_sides_and_0_where_a_row_has_none(tmp_path):
    rows = [row("a", margin=1.5), row("b"), row("c", margin=-2), row("d", margin=None)]
    cache = made(tmp_path, rows)
    assert margins(cache) == [1.5, 1.5, 0, 0, -2, -2, 0, 0]
    assert [example.margin for example in cache.read([4, 1])] == [-2, 1.5]


def test_it_may_have_another_name_or_be_left_alone(tmp_path):
    rows = [row("a", margin="wide", gap=3), row("b", margin="thin", gap=0.5)]
    assert margins(made(tmp_path, rows, margin="gap")) == [3, 3, 0.5, 0.5]
    assert margins(made(tmp_path, rows, margin="")) == [0, 0, 0, 0]


def test_it_is_read_of_every_format_of_pairs(tmp_path):
    text = "\n\nHuman: q\n\nAssistant: "
    rows = {
        "hh": {"chosen": text + "good", "rejected": text + "bad"},
        "fields": {"ask": "q", "good": "yes", "bad": "no"},
        "llama_factory": {"instruction": "q", "chosen": "yes", "rejected": "no"},
    }
    for name, one in rows.items():
        folder = tmp_path / name
        folder.mkdir()
        fields = {"user": "ask", "chosen": "good", "rejected": "bad"} if name == "fields" else {}
        assert margins(made(folder, [{**one, "margin": 2}], fields=fields)) == [2, 2], name


def test_what_is_no_number_is_told_with_its_line_and_what_to_do(tmp_path):
    rows = [row("a", margin="1.5"), row("b", margin=True), row("c", margin=2), row("d", margin=[])]
    with pytest.raises(BadRows) as error:
        made(tmp_path, rows)
    told = str(error.value)
    assert told.startswith("3 of 4 rows are bad")
    for line, found in ((1, 'no number: "1.5"'), (2, "no number: bool True"), (4, "a list of 0")):
        assert f"one.jsonl:{line}: margin: " in told
        assert found in told
    assert "margin: '' in the source" in told
    for text in ("NaN", "Infinity"):
        (tmp_path / "one.jsonl").write_text(json.dumps(row("a"))[:-1] + f', "margin": {text}}}\n')
        with pytest.raises(BadRows):
            prepare(
                config(tmp_path, sources={"one": {"path": str(tmp_path / "one.jsonl")}}),
                FakeChat(), kind="pairs", quiet=True,
            )  # fmt: skip


def test_a_pair_that_is_cut_keeps_it(tmp_path):
    rows = [row("q" * 40, margin=0.25)]
    cache = made(tmp_path, rows, {"seq_len": 60, "too_long": "truncate_start"})
    assert cache.report.total.truncated == 1
    assert margins(cache) == [0.25, 0.25]


def test_the_segments_of_a_batch_have_it_wherever_they_lie(tmp_path):
    cache = made(tmp_path, [row("a", margin=1), row("b", margin=2), row("c", margin=3)])
    layout = np.array([[[4, 1], [2, -1], [0, 3], [5, -1]]], np.int32)
    batch = make_rows(cache, layout, cache.source_ids, 128, pair_ids=pair_numbers(layout))
    assert batch.margins.dtype == np.float32
    assert batch.margins.tolist() == [[[3, 1], [2, 0], [1, 2], [3, 0]]]
    assert make_rows(cache, layout, cache.source_ids, 128).margins is None
