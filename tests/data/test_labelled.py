"""Answers labelled good or bad: their rows, their mismatched twins, what becomes of bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.config import ConfigError
from posttrain.data.cache import Cache
from posttrain.data.check import check
from posttrain.data.config import DataConfig, SourceConfig
from posttrain.data.fit import with_twins
from posttrain.data.formats import find_format, get_format
from posttrain.data.pipeline import Pipeline
from posttrain.data.plan import BatchConfig, Plan
from posttrain.data.prepare import BadRows, prepare
from posttrain.data.rows import RowError
from posttrain.types import TWIN, Conversation, DataKind, Example, Labelled, Text
from tests.data.fakes import BOS, END, FakeChat
from tests.data.prepared import write

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}


def convert(row: Any, **source: Any) -> Labelled:
    cfg = SourceConfig(path="f", **source)
    made = get_format(find_format(row, cfg, "f:1", kind="labelled")).convert(row, cfg)
    assert isinstance(made, Labelled)
    return made


def weights(made: Labelled) -> list[float]:
    assert isinstance(made.sample, Conversation)
    return [m.get("weight", 1.0) for m in made.sample.messages if m["role"] == "assistant"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": [ANSWER], "label": True},
        {"messages": [USER, ANSWER], "label": True},
        {"messages": [USER, ANSWER], "kto_tag": True},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
         "label": True},
        {"instruction": "2+2?", "output": "4", "kto_tag": True},
    ],
    ids=["trl", "messages", "kto_tag", "sharegpt", "alpaca"],
)  # fmt: skip
def test_shapes_of_rows(row: dict[str, Any]) -> None:
    made = convert(row)
    assert made.label is True
    assert isinstance(made.sample, Conversation)
    assert [(m["role"], m["content"]) for m in made.sample.messages] == [
        ("user", "2+2?"),
        ("assistant", "4"),
    ]
    key = "kto_tag" if "kto_tag" in row else "label"
    assert convert({**row, key: False}).label is False


def test_texts_need_no_template() -> None:
    made = convert({"prompt": "2+2=", "completion": "4", "label": False})
    assert made == Labelled(Text("4", "2+2="), False)


def test_the_last_message_alone_is_judged() -> None:
    """But of prompt and completion, all that the completion says."""
    turns = [USER, WRONG, USER, ANSWER]
    assert weights(convert({"messages": turns, "label": True})) == [0.0, 1.0]
    whole = {"prompt": turns[:2], "completion": [ANSWER, USER, ANSWER], "label": True}
    assert weights(convert(whole)) == [0.0, 1.0, 1.0]


def test_own_columns() -> None:
    made = convert(
        {"q": "2+2?", "a": "4", "liked": False},
        fields={"user": "q", "assistant": "a", "label": "liked"},
    )
    assert made.label is False
    assert weights(made) == [1.0]
    turns = {"talk": [USER, WRONG, USER, ANSWER], "liked": True}
    assert weights(convert(turns, fields={"messages": "talk", "label": "liked"})) == [0.0, 1.0]
    heavy = {"talk": [USER, {**ANSWER, "weight": 2}], "liked": True}
    with pytest.raises(RowError, match=r"weight: float 2\.0 in an answer that is judged"):
        convert(heavy, fields={"messages": "talk", "label": "liked"})
    with pytest.raises(RowError, match='liked: wrong type: "yes"'):
        convert({**turns, "liked": "yes"}, fields={"messages": "talk", "label": "liked"})


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"messages": [USER, ANSWER], "label": 1}, "label: wrong type: int 1"),
        ({"messages": [USER, ANSWER], "label": "good"}, 'label: wrong type: "good"'),
        ({"messages": [USER], "label": True}, "messages"),
        ({"prompt": [USER], "completion": [], "label": "x"}, "completion: an empty list.*label"),
        (
            {"messages": [USER, {**ANSWER, "weight": 0.5}], "label": True},
            "weight: float 0.5 in an answer that is judged",
        ),
        (
            {"messages": [USER, ANSWER], "label": True, "kto_tag": False},
            "kto_tag: bool False, where label is bool True",
        ),
    ],
)
def test_bad_rows_say_what_and_where(row: dict[str, Any], found: str) -> None:
    with pytest.raises(RowError, match=found):
        get_format("labelled").convert(row, SourceConfig(path="f"))


def test_kinds_of_data_are_told_apart() -> None:
    labelled = {"messages": [USER, ANSWER], "label": True}
    pair = {"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]}
    cfg = SourceConfig(path="f")
    for kind in ("labelled", "twinned"):
        assert find_format(labelled, cfg, "f:1", kind=kind) == "labelled"  # pyright: ignore
    assert find_format(pair, cfg, "f:1", kind="labelled") == "preference"
    with pytest.raises(ValueError, match=r"samples to imitate.*`posttrain sft`.*column label"):
        find_format({"messages": [USER, ANSWER]}, cfg, "f:1", kind="twinned")
    with pytest.raises(ValueError, match=r"labelled good or bad.*not pairs.*loss.type=kto"):
        find_format(labelled, cfg, "f:1", kind="pairs")
    with pytest.raises(ValueError, match=r"labelled good or bad.*loss.type=kto"):
        find_format(labelled, cfg, "f:1")
    with pytest.raises(ValueError, match=r"format: text makes samples to imitate, not labelled"):
        find_format(labelled, SourceConfig(path="f", format="text"), "f:1", kind="labelled")


def row(i: int, size: int = 3) -> dict[str, Any]:
    answer = {"role": "assistant", "content": chr(65 + i) * size}
    return {"prompt": [{"role": "user", "content": str(i)}], "completion": [answer],
            "label": i % 3 > 0}  # fmt: skip


def make(tmp_path: Path, rows: list[Any], kind: DataKind = "twinned", **changes: Any) -> Cache:
    source = {"path": write(tmp_path / "rows.jsonl", rows)}
    settings = {"cache_dir": str(tmp_path / "cache"), "workers": 0, "seq_len": 64, **changes}
    cfg = DataConfig.model_validate({"sources": {"one": source}, **settings})
    return prepare(cfg, FakeChat(), kind=kind, quiet=True)  # pyright: ignore[reportArgumentType]


def text(example: Example) -> str:
    return "".join("|" if t in (BOS, END) else chr(t) for t in example.tokens.tolist())


def test_a_twin_has_the_prompt_and_the_answer_before_it_in_its_block(tmp_path: Path) -> None:
    """Blocks of three: rotated by one within each; a last block of one row joins the one before."""
    cache = make(tmp_path, [row(i) for i in range(7)], kl_block=3)
    assert (len(cache), cache.sides) == (14, 2)
    answers = ["CAB", "GDEF"]  # whose answer each twin has, block by block
    for i, answer in enumerate("".join(answers)):
        real, twin = cache.read([2 * i, 2 * i + 1])
        assert text(real) == f"|{i}|{chr(65 + i) * 3}|"
        assert text(twin) == f"|{i}|{answer * 3}|"
        assert (twin.loss_weights > 0).tolist() == (real.loss_weights > 0).tolist()
        assert (real.label, twin.label) == (int(i % 3 > 0), TWIN)
    report = cache.report.sources["one"]
    assert (report.examples, report.desirable, report.twins_cut) == (7, 4, 0)


def test_without_twins_a_row_is_an_example(tmp_path: Path) -> None:
    cache = make(tmp_path, [row(i) for i in range(5)], "labelled")
    assert (len(cache), cache.sides) == (5, 1)
    assert [e.label for e in cache.read(range(5))] == [0, 1, 1, 0, 1]


def test_a_twin_over_seq_len_is_cut_and_counted(tmp_path: Path) -> None:
    long = {**row(1), "prompt": [{"role": "user", "content": "q" * 20}]}
    cache = make(tmp_path, [row(0, size=25), long], seq_len=32)
    assert cache.lengths.tolist() == [29, 7, 26, 32]
    assert cache.report.sources["one"].twins_cut == 1
    assert any("1 mismatched twins over 32 tokens cut" in line for line in cache.report.losses())


def test_rows_that_are_left_out_lend_no_answer(tmp_path: Path) -> None:
    rows = [row(0), row(1, size=60), row(2), {**row(3), "label": None}]
    cache = make(tmp_path, rows, too_long="drop", on_bad_row="skip", seq_len=32)
    assert [text(e) for e in cache.read(range(4))] == ["|0|AAA|", "|0|CCC|", "|2|CCC|", "|2|AAA|"]
    report = cache.report.sources["one"]
    assert (report.rows, report.bad_rows, report.examples) == (4, 1, 2)
    assert report.dropped == {"longer than seq_len": 1}
    with pytest.raises(BadRows, match=r"rows.jsonl:4: label: missing or null"):
        make(tmp_path, rows, too_long="drop", seq_len=32)


def test_a_row_without_another_has_no_twin(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no example left.*1 dropped: no answer to another"):
        make(tmp_path, [row(0)])
    assert with_twins([], [], 8, 10).examples == []


def test_a_twin_has_no_answer_to_its_own_prompt(tmp_path: Path) -> None:
    """It would measure a reward and no KL: the answer before that one is taken."""
    ask = [{"role": "user", "content": "0"}]
    rows = [row(0), row(1), {**row(2), "prompt": ask}, {**row(3), "prompt": ask}]
    cache = make(tmp_path, rows, kl_block=4)
    assert [text(e) for e in cache.read(range(1, 8, 2))] == ["|0|BBB|", "|1|AAA|", "|0|BBB|",
                                                             "|0|BBB|"]  # fmt: skip
    with pytest.raises(ValueError, match=r"no example left of 2 rows \(2 dropped: no answer to"):
        make(tmp_path, rows[2:])


def test_an_answer_is_not_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an answer is judged whole"):
        make(tmp_path, [row(0), row(1)], too_long="split")


def test_check_lists_bad_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row(0), {**row(1), "label": "yes"}])
    cfg = DataConfig.model_validate({"sources": {"one": {"path": path}}})
    for kind in ("labelled", "twinned"):
        found = check(cfg, FakeChat(), kind=kind)  # pyright: ignore[reportArgumentType]
        assert [(d.line, d.field) for d in found.defects] == [(2, "label")]


def test_settings_make_another_cache(tmp_path: Path) -> None:
    rows = [row(i) for i in range(4)]
    kinds: list[tuple[DataKind, dict[str, int]]] = [
        ("twinned", {}),
        ("twinned", {"kl_block": 2}),
        ("labelled", {}),
        ("labelled", {"kl_block": 2}),  # of no meaning there
    ]
    folders = {make(tmp_path, rows, kind, **changes).folder for kind, changes in kinds}
    assert len(folders) == 3


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_labels_come_with_the_batch_and_twins_beside_their_rows(
    tmp_path: Path, packing: Any
) -> None:
    cache = make(tmp_path, [row(i) for i in range(12)])
    batch = BatchConfig(examples=6, packing=packing, accumulate=2, threads=0)
    plan = Plan(cache, batch, seq_len=64, seed=0, epochs=1, batch_shards=2)
    assert plan.steps == 2
    with Pipeline(cache, plan) as steps:
        for step in steps:
            ids, labels = step.example_ids, step.labels
            assert labels.dtype == np.int8
            assert (labels[ids < 0] == -1).all()
            assert (labels[(ids >= 0) & (ids % 2 == 1)] == TWIN).all()
            assert (labels[(ids >= 0) & (ids % 2 == 0)] >= 0).all()
            for micro in ids:
                there = set(micro[micro >= 0].tolist())
                assert there == {i ^ 1 for i in there}, "a row and its twin are in one micro-batch"


def test_llama_factorys_file(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "data/llama_factory/kto_en_demo.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    settings = {"cache_dir": str(tmp_path), "workers": 0, "seq_len": 100_000}
    cfg = DataConfig.model_validate({"sources": {"kto": {"path": str(path)}}, **settings})
    cache = prepare(cfg, FakeChat(), kind="twinned", quiet=True)  # pyright: ignore
    assert len(cache) == 2 * len(rows)
    for i, example in enumerate(cache.read(range(0, len(cache), 2))):
        answer = rows[i]["messages"][-1]["content"].encode()
        assert example.tokens[example.loss_weights > 0].tolist() == [*answer, END]
        assert example.label == rows[i]["label"]
