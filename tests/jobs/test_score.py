"""`posttrain score`: every row its own score, in the order of the file, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from datetime import date
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from posttrain import config
from posttrain.config import ConfigError
from posttrain.data import progress
from posttrain.data.prepare import BadRows
from posttrain.jobs import score
from tests.jobs.runs import mesh_keys


@pytest.fixture(scope="module")
def rows(data_dir: Path) -> list[dict]:
    """The chosen and the rejected side of the first golden pairs, as conversations with an id."""
    found = []
    for line in (data_dir / "golden" / "prefs.jsonl").read_text().splitlines()[:4]:
        row = json.loads(line)
        for side in ("chosen", "rejected"):
            found.append({"messages": row["prompt"] + row[side], "id": f"ä{len(found)}"})
    return found


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


@pytest.fixture
def keys(data_dir: Path, tmp_path: Path) -> list[str]:
    return [
        f"model.path={data_dir / 'golden' / 'model_rm'}",
        *("model.dtype=float32", "model.remat=none", "rows=2"),
        *(f"out={tmp_path / 'scored.jsonl'}", f"cache_dir={tmp_path / 'cache'}"),
        *mesh_keys(1, 2, 1),
    ]


def run(keys: list[str], file: Path, *more: str) -> list[dict]:
    """Runs the job on two devices; the rows it wrote."""
    cfg = config.load(score.Config, [], [*keys, f"input={file}", *more])
    assert score.run(cfg) == 0
    return [json.loads(line) for line in cfg.out.open(encoding="utf-8")]


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job takes all devices of its process: here two of the eight."""
    import jax

    some = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: some)


def test_rows_come_back_in_order_with_the_scores_of_trl(
    keys: list[str],
    rows: list[dict],
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRL's first step of the golden run is of these eight answers."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    found = run(keys, write(tmp_path / "in.jsonl", rows))
    assert [{k: v for k, v in row.items() if k != "score"} for row in found] == rows
    log = json.loads((data_dir / "golden" / "reward_b4.json").read_text())["log_history"][0]
    scores = np.array([row["score"] for row in found])
    figures = {
        "min_reward": scores.min(),
        "mean_reward": scores.mean(),
        "max_reward": scores.max(),
        "margin": (scores[::2] - scores[1::2]).mean(),
        "accuracy": (scores[::2] > scores[1::2]).mean(),
    }
    for name, value in figures.items():
        assert value == pytest.approx(log[name], abs=1e-5), name
    said = capsys.readouterr()
    assert "8 of 8 rows scored; mean" in said.out
    assert "score 100% 8 examples" in said.err
    assert '"id": "ä0"' in (tmp_path / "scored.jsonl").read_text()
    again = run(keys, write(tmp_path / "back.jsonl", rows[::-1]), "column=reward", "rows=1")
    assert list(again[0]) == ["messages", "id", "reward"]
    np.testing.assert_allclose([row["reward"] for row in again], scores[::-1], atol=1e-5)


def test_prompts_and_completions_are_templated_where_fields_say_so(
    keys: list[str], tmp_path: Path
) -> None:
    texts = [{"prompt": "Is the sea salty?", "completion": "Yes."}]
    turns = [{"messages": [{"role": "user", "content": texts[0]["prompt"]},
                           {"role": "assistant", "content": texts[0]["completion"]}]}]  # fmt: skip
    fields = ["fields.user=prompt", "fields.assistant=completion"]
    templated = run(keys, write(tmp_path / "texts.jsonl", texts), *fields)[0]["score"]
    assert templated == run(keys, write(tmp_path / "turns.jsonl", turns))[0]["score"]
    assert abs(run(keys, tmp_path / "texts.jsonl")[0]["score"] - templated) > 1e-4


def test_what_cannot_be_scored_is_told_at_once_or_null(
    keys: list[str], rows: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    question = {"messages": [{"role": "user", "content": "And?"}]}
    long = {"messages": [*rows[0]["messages"][:-1],
                         {"role": "assistant", "content": "word " * 900}]}  # fmt: skip
    file = write(tmp_path / "in.jsonl", [rows[0], question, long, rows[1]])
    with pytest.raises(BadRows) as error:
        run(keys, file, "seq_len=768")
    assert "in.jsonl:2: messages: no assistant message" in str(error.value)
    assert "in.jsonl:3: row: " in str(error.value)
    assert "tokens, over seq_len (768) -> too_long=skip gives it no score" in str(error.value)
    assert "on_bad_row=skip" in str(error.value)
    assert "data." not in str(error.value).replace(str(file), "")
    assert not list(tmp_path.glob("scored.jsonl*"))
    found = run(keys, file, "seq_len=768", "too_long=skip", "on_bad_row=skip")
    assert [row["score"] is None for row in found] == [False, True, True, False]
    assert [row["messages"] for row in found] == [
        row["messages"] for row in (rows[0], question, long, rows[1])
    ]
    said = capsys.readouterr().out
    assert "2 of 4 rows scored, 2 null; mean " in said
    assert "1 bad rows skipped" in said
    assert "1 dropped: longer than seq_len" in said
    whole = run(keys, file, "seq_len=768", "too_long=truncate_start", "on_bad_row=skip")
    assert whole[2]["score"] is not None
    assert "1 examples over 768 tokens cut" in capsys.readouterr().out
    assert whole[0]["score"] == pytest.approx(found[0]["score"], abs=1e-5)


def test_a_pair_gets_a_score_on_each_side_and_the_file_an_accuracy(
    keys: list[str], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The same first step of the golden run, from the pairs themselves; one bad pair among them."""
    lines = (data_dir / "golden" / "prefs.jsonl").read_text().splitlines()[:4]
    pairs = [json.loads(line) for line in lines]
    broken = {**pairs[0], "chosen": pairs[0]["rejected"]}
    file = write(tmp_path / "in.jsonl", [*pairs[:2], broken, *pairs[2:]])
    found = run(keys, file, "on_bad_row=skip")
    assert [{k: row[k] for k in pairs[0]} for row in found] == [*pairs[:2], broken, *pairs[2:]]
    bad = found.pop(2)
    assert bad["score_chosen"] is bad["score_rejected"] is None
    log = json.loads((data_dir / "golden" / "reward_b4.json").read_text())["log_history"][0]
    scores = np.array([[row["score_chosen"], row["score_rejected"]] for row in found])
    assert scores.mean() == pytest.approx(log["mean_reward"], abs=1e-5)
    assert (scores[:, 0] - scores[:, 1]).mean() == pytest.approx(log["margin"], abs=1e-5)
    said = capsys.readouterr().out
    assert "4 of 5 pairs scored, 1 null; mean" in said
    assert f"accuracy {log['accuracy']:.4f}, ece 0." in said
    assert "brier 0.2" in said
    assert "length_correlation" in said
    write(file, [{**pair, "score_rejected": 1} for pair in pairs])
    with pytest.raises(ConfigError, match="has a column 'score_rejected' already"):
        run(keys, file)


QUESTION, ANSWER = "Is the sea salty?", "It is: salt\u2028from rivers."
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
FORMS: dict[str, dict] = {
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION},
                                   {"from": "gpt", "value": ANSWER}]},
    "alpaca": {"instruction": QUESTION, "output": ANSWER},
    "prompt_completion": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "labelled": {"prompt": TURNS[:1], "completion": TURNS[1:], "label": False},
    "fields": {"q": QUESTION, "a": {"text": ANSWER}},
}  # fmt: skip


def test_one_talk_has_one_score_in_whatever_form_it_comes(keys: list[str], tmp_path: Path) -> None:
    want = run(keys, write(tmp_path / "messages.jsonl", [{"messages": TURNS}]))[0]["score"]
    for name, row in FORMS.items():
        more = ["fields.user=q", "fields.assistant=a.text"] if name == "fields" else []
        (found,) = run(keys, write(tmp_path / f"{name}.jsonl", [row]), *more)
        assert found == {**row, "score": want}, name


def test_of_several_thoughts_the_last_turn_is_scored(keys: list[str], tmp_path: Path) -> None:
    """A template that drops earlier thoughts makes two examples of the talk, to be trained on."""
    template = tmp_path / "thoughts.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
        "{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}"
    )
    first, last = ({**TURNS[1], "reasoning_content": thought} for thought in ("Hm.", "Ah."))
    talks = [[*TURNS[:1], first, *TURNS[:1], last], [*TURNS, *TURNS[:1], last]]
    file = write(tmp_path / "in.jsonl", [{"messages": talk} for talk in talks])
    found = run(keys, file, f"chat.template={template}")
    assert found[0]["score"] == found[1]["score"]


def test_what_json_has_no_word_for_is_written_all_the_same(keys: list[str], tmp_path: Path) -> None:
    """A date and a NaN of a Parquet file; half a character, whose row is bad; half a line."""
    table = pa.table({"messages": [TURNS], "day": [date(2025, 1, 2)], "rank": [float("nan")]})
    pq.write_table(table, tmp_path / "in.parquet")
    (found,) = run(keys, tmp_path / "in.parquet")
    assert (found["day"], found["rank"]) == ("2025-01-02", None)
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "\\ud800", "completion": "x"}\n{"prompt\n'
                    '{"prompt": "a", "completion": "b"}\n')  # fmt: skip
    half, none, whole = run(keys, file, "on_bad_row=skip")
    assert half == {"prompt": "\ud800", "completion": "x", "score": None}
    assert none == {"score": None}
    assert whole["score"] is not None


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """60 MB of rows are looked through and copied within 6."""
    rows = [{"messages": TURNS, "id": i, "rest": "x" * 10_000} for i in range(6_000)]
    file = write(tmp_path / "in.jsonl", rows)
    del rows
    cfg = config.load(score.Config, [], ["model.path=m", f"input={file}", "out=o.jsonl"])
    cache: Any = SimpleNamespace(sides=1, place=lambda i: f"{file}:{i + 1}")
    out = (tmp_path / "out.jsonl").open("w")
    tracemalloc.start()
    found = score.look(cfg)
    score.copy(cfg, found, cache, np.arange(6_000, dtype=np.float32), out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    out.close()
    assert found.count == 6_000
    assert peak < 6e6
    assert (tmp_path / "out.jsonl").stat().st_size > 60e6
    with pytest.raises(ValueError, match="has changed while it was scored"):
        score.copy(cfg, found, cache, np.zeros(6_001, np.float32), StringIO())
    with pytest.raises(ValueError, match=r"in\.jsonl:1: its score is nan"):
        score.copy(cfg, found, cache, np.full(6_000, np.nan, np.float32), StringIO())


def folder_like(golden: Path, made: Path, **changes: Any) -> Path:
    """The golden reward model with another config.json (None: the field is taken out)."""
    made.mkdir()
    for file in golden.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    raw = json.loads((golden / "config.json").read_text()) | changes
    raw = {name: value for name, value in raw.items() if name not in changes or value is not None}
    (made / "config.json").write_text(json.dumps(raw))
    return made


def test_the_padding_token_and_the_labels_name_play_no_part(
    keys: list[str], rows: list[dict], data_dir: Path, tmp_path: Path
) -> None:
    golden = data_dir / "golden" / "model_rm"
    file = write(tmp_path / "in.jsonl", rows[:2])
    want = run(keys, file)
    changes = {
        "none": {"pad_token_id": None, "id2label": {"0": "reward"}, "label2id": {"reward": 0}},
        "the end's": {"pad_token_id": 2, "id2label": None, "label2id": None, "num_labels": 1},
    }
    for name, change in changes.items():
        folder = folder_like(golden, tmp_path / name, **change)
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        del tokenizer["pad_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        assert run([*keys, f"model.path={folder}"], file) == want, name


def test_what_is_no_reward_model_is_told_by_file_and_field(
    keys: list[str], rows: list[dict], data_dir: Path, tmp_path: Path
) -> None:
    golden = data_dir / "golden" / "model_rm"
    file = write(tmp_path / "in.jsonl", rows[:1])
    two = folder_like(golden, tmp_path / "two", id2label={"0": "bad", "1": "good"})
    with pytest.raises(ValueError, match=r"two/config\.json: id2label gives 2 labels"):
        run([*keys, f"model.path={two}"], file)
    two = folder_like(golden, tmp_path / "said", id2label=None, num_labels=2)
    with pytest.raises(ValueError, match=r"said/config\.json: num_labels gives 2 labels"):
        run([*keys, f"model.path={two}"], file)
    rows_of_2 = folder_like(golden, tmp_path / "wide", id2label=None, label2id=None)
    weights = load_file(rows_of_2 / "model.safetensors")
    weights["score.weight"] = np.repeat(weights["score.weight"], 2, 0)
    save_file(weights, rows_of_2 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"score\.weight is \[2, 128\]"):
        run([*keys, f"model.path={rows_of_2}"], file)
    plain = folder_like(golden, tmp_path / "plain", architectures=["LlamaForCausalLM"])
    with pytest.raises(ConfigError, match=r'no score head.*\["LlamaForSequenceClassification"\]'):
        run([*keys, f"model.path={plain}"], file)
    with pytest.raises(ConfigError, match=r"input: .*none\.jsonl: no such file"):
        run(keys, tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"input: .*empty\.jsonl has no rows"):
        run(keys, write(tmp_path / "empty.jsonl", []))
    with pytest.raises(ConfigError, match=r"name that ends in \.jsonl"):
        run(keys, file, f"out={tmp_path / 'scored.parquet'}")
    with pytest.raises(ConfigError, match="a folder: name a file in it"):
        run(keys, file, f"out={tmp_path}")


def test_a_row_with_a_score_and_a_model_without_a_head_are_refused(
    keys: list[str], rows: list[dict], data_dir: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "in.jsonl", [rows[0], {**rows[1], "score": 1}])
    with pytest.raises(ConfigError, match=r"in\.jsonl:2: has a column 'score' already"):
        run(keys, file)
    write(file, rows)
    with pytest.raises(ConfigError, match="no score head"):
        run([*keys, f"model.path={data_dir / 'golden' / 'model'}"], file)
    with pytest.raises(ConfigError, match="seq_len is 4096, and the model's context is 2048"):
        run(keys, file, "seq_len=4096")
    with pytest.raises(ConfigError, match="a folder: name a file"):
        run(keys, file, f"out={tmp_path}")
