"""Pairs where a loss takes answers one by one: each is two answers, the chosen one desirable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.data.check import check
from posttrain.data.config import DataConfig
from posttrain.data.fit import by_label
from posttrain.data.plan import BatchConfig, Plan
from posttrain.data.prepare import BadRows
from posttrain.data.preview import rows_in_use
from posttrain.types import TWIN, DataKind
from tests.data.fakes import FakeChat
from tests.data.prepared import write
from tests.data.test_labelled import make, text


def pair(i: int, size: int = 3) -> dict[str, Any]:
    sides = {"chosen": chr(65 + i), "rejected": chr(97 + i)}
    answers = {
        name: [{"role": "assistant", "content": letter * size}] for name, letter in sides.items()
    }
    return {"prompt": [{"role": "user", "content": str(i)}], **answers}


def test_a_pair_is_two_labelled_answers(tmp_path: Path) -> None:
    cache = make(tmp_path, [pair(i) for i in range(3)], "labelled")
    made = cache.read(range(len(cache)))
    assert [(text(e), e.label) for e in made] == [
        ("|0|AAA|", 1), ("|0|aaa|", 0), ("|1|BBB|", 1), ("|1|bbb|", 0), ("|2|CCC|", 1),
        ("|2|ccc|", 0),
    ]  # fmt: skip
    report = cache.report.sources["one"]
    assert (report.rows, report.examples, report.desirable, report.unpaired) == (6, 6, 3, 3)
    assert any("3 pairs read as two answers each" in line for line in cache.report.losses())


def test_their_twins_answer_other_prompts_of_their_block(tmp_path: Path) -> None:
    """Blocks of four: the chosen answers of two pairs, then the rejected ones."""
    cache = make(tmp_path, [pair(i) for i in range(5)], kl_block=4)
    read = [(text(a), text(b)) for a, b in zip(*[iter(cache.read(range(20)))] * 2, strict=True)]
    assert read[:4] == [
        ("|0|AAA|", "|0|bbb|"), ("|1|BBB|", "|1|AAA|"), ("|0|aaa|", "|0|BBB|"),
        ("|1|bbb|", "|1|aaa|"),
    ]  # fmt: skip
    assert all(row[1] == twin[1] and row[3].lower() != twin[3].lower() for row, twin in read)
    assert [e.label for e in cache.read(range(0, 20, 2))] == [1, 1, 0, 0, 1, 1, 0, 0, 1, 0]
    assert read[8:] == [("|4|EEE|", "|4|ddd|"), ("|4|eee|", "|4|ddd|")], "in the block before"


@pytest.mark.parametrize(("pairs", "block"), [(0, 8), (1, 8), (5, 4), (7, 8), (3, 3), (9, 2)])
def test_every_answer_has_a_place(pairs: int, block: int) -> None:
    order = by_label(pairs, block)
    assert sorted(order) == list(range(2 * pairs))
    for p in range(pairs):
        assert order.index(2 * p) < order.index(2 * p + 1)


def test_what_is_too_long_or_bad_is_counted_by_answers(tmp_path: Path) -> None:
    long = pair(1)
    long["rejected"][0]["content"] = "x" * 60
    rows = [pair(0), long, {**pair(2), "chosen": []}]
    cache = make(tmp_path, rows, "labelled", too_long="drop", on_bad_row="skip", seq_len=32)
    assert [text(e) for e in cache.read(range(3))] == ["|0|AAA|", "|0|aaa|", "|1|BBB|"]
    report = cache.report.sources["one"]
    assert (report.rows, report.bad_rows, report.examples) == (5, 1, 3)
    assert report.dropped == {"longer than seq_len": 1}
    path = write(tmp_path / "again.jsonl", rows)
    cfg = DataConfig.model_validate({"sources": {"one": {"path": path}}, "seq_len": 64})
    checked = check(cfg, FakeChat(), kind="twinned")  # pyright: ignore[reportArgumentType]
    assert [(d.line, d.field) for d in checked.defects] == [(3, "chosen")]
    assert checked.rows == 3
    with pytest.raises(BadRows, match="1 of 3 rows are bad"):
        make(tmp_path, rows)


@pytest.mark.parametrize("rows", ["dpo_en_demo", "hh"])
def test_real_pairs(rows: str, data_dir: Path, tmp_path: Path) -> None:
    """Every form of pairs: LLaMA-Factory's ShareGPT columns, Anthropic's transcripts."""
    folder = data_dir / "data"
    path = {
        "dpo_en_demo": folder / "llama_factory/dpo_en_demo.jsonl",
        "hh": folder / "hh_rlhf/harmless_base_test_part_eval.jsonl",
    }[rows]
    some = [json.loads(line) for line in path.read_text().splitlines()[:40]]
    kinds: list[DataKind] = ["labelled", "pairs"]
    made, pairs = (make(tmp_path, some, kind, seq_len=50_000, on_bad_row="skip") for kind in kinds)
    assert len(made) == len(pairs) > 50
    for one, side in zip(made.read(range(len(made))), pairs.read(range(len(pairs))), strict=True):
        np.testing.assert_array_equal(one.tokens, side.tokens)
        np.testing.assert_array_equal(one.loss_weights, side.loss_weights)
    assert [e.label for e in made.read(range(len(made)))] == [1, 0] * (len(made) // 2)


def test_a_preview_says_what_each_answer_is(tmp_path: Path) -> None:
    cache = make(tmp_path, [pair(i) for i in range(4)])
    plan = Plan(cache, BatchConfig(examples=4, order="sequential"), seq_len=64, seed=0, epochs=1)

    class Letters:
        special_ids = frozenset(range(256, 300))

        def token(self, i: int) -> str:
            return chr(i)

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    shown = rows_in_use(cache, plan, Letters())  # pyright: ignore[reportArgumentType]
    segments = [segment for row in shown for segment in row.segments]
    labels = {1: "desirable", 0: "undesirable", TWIN: "mismatched twin"}
    assert {s.example: s.side for s in segments} == {
        i: labels[cache.read([i])[0].label] for i in range(len(cache))
    }
