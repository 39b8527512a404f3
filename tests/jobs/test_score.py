"""`posttrain score`: every row its own score, in the order of the file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from posttrain import config
from posttrain.config import ConfigError
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
    return [json.loads(line) for line in cfg.out.read_text().splitlines()]


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job takes all devices of its process: here two of the eight."""
    import jax

    some = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: some)


def test_rows_come_back_in_order_with_the_scores_of_trl(
    keys: list[str], rows: list[dict], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """TRL's first step of the golden run is of these eight answers."""
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
    assert "8 of 8 rows scored" in capsys.readouterr().out
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
    assert not (tmp_path / "scored.jsonl").exists()
    found = run(keys, file, "seq_len=768", "too_long=skip", "on_bad_row=skip")
    assert [row["score"] is None for row in found] == [False, True, True, False]
    assert [row["messages"] for row in found] == [
        row["messages"] for row in (rows[0], question, long, rows[1])
    ]
    said = capsys.readouterr().out
    assert "2 of 4 rows scored (2 are null: " in said
    assert "bad rows" in said
    assert "longer than seq_len" in said
    whole = run(keys, file, "seq_len=768", "too_long=truncate_start", "on_bad_row=skip")
    assert whole[2]["score"] is not None
    assert whole[0]["score"] == pytest.approx(found[0]["score"], abs=1e-5)


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
