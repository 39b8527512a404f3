"""Rows survive a kill at any byte: the file is the same as one written in one go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.config import ConfigError
from posttrain.sampling.journal import Journal

HEADER = {"n": 4, "model.path": "m"}
PROMPTS = [[{"text": "a\ud800"}], [], [{"text": "ä"}, {"text": "c"}], [{"text": "d"}]]


def go_on(path: Path, until: int = len(PROMPTS)) -> None:
    with Journal(path, HEADER) as journal:
        for i in range(len(journal.done), until):
            journal.append(PROMPTS[i], {"prompt": i})


@pytest.fixture
def whole(tmp_path: Path) -> tuple[bytes, bytes]:
    path = tmp_path / "whole.jsonl"
    go_on(path)
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert rows == [row for prompt in PROMPTS for row in prompt]
    return path.read_bytes(), path.with_name("whole.jsonl.progress").read_bytes()


def test_a_file_killed_at_any_byte_is_the_same_in_the_end(tmp_path, whole):
    """Rows are on disk before the line that stands for them: so many rows, any part of the line."""
    rows, lines = whole
    path, beside = tmp_path / "cut.jsonl", tmp_path / "cut.jsonl.progress"
    ends = [json.loads(line).get("end", 0) for line in lines.splitlines()]
    borders = {at + 1 for at, byte in enumerate(lines) if byte == ord("\n")}
    for cut in sorted({*range(0, len(lines), 11), *borders, *(at - 1 for at in borders)}):
        counted = lines[:cut].count(b"\n")
        least = ends[counted - 1] if counted else 0
        most = ends[counted] if counted < len(ends) else len(rows)
        for size in {least, (least + most) // 2, most}:
            beside.write_bytes(lines[:cut])
            path.write_bytes(rows[:size])
            go_on(path)
            assert (path.read_bytes(), beside.read_bytes()) == whole


def test_what_is_done_with_is_not_done_again(tmp_path, whole):
    path = tmp_path / "a.jsonl"
    go_on(path, 2)
    with Journal(path, HEADER) as journal:
        assert [line["prompt"] for line in journal.done] == [0, 1]
    go_on(path)
    assert (path.read_bytes(), path.with_name("a.jsonl.progress").read_bytes()) == whole
    with Journal(path, HEADER) as journal:
        assert len(journal.done) == len(PROMPTS)
    assert path.read_bytes() == whole[0]


def test_files_of_others_are_not_touched(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("mine\n")
    with pytest.raises(ConfigError, match="is there, and not of this command: name another"):
        Journal(path, HEADER)
    assert path.read_text() == "mine\n"
    with pytest.raises(ConfigError, match=r"name a file that ends in \.jsonl"):
        Journal(tmp_path / "a.txt", HEADER)


def test_another_config_is_refused_key_by_key(tmp_path):
    path = tmp_path / "a.jsonl"
    go_on(path, 3)
    before = path.read_bytes()
    with pytest.raises(ConfigError) as error:
        Journal(path, {"n": 8, "seed": 1})
    for said in ("n = 4 (now 8)", 'model.path = "m" (now null)', "seed = null (now 1)"):
        assert said in str(error.value)
    assert path.read_bytes() == before
    go_on(path)  # the lock is free again


def test_rows_that_were_cut_short_by_somebody_are_told(tmp_path):
    path = tmp_path / "a.jsonl"
    go_on(path, 3)
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(ConfigError, match=r"is shorter than it was: remove it and a\.jsonl\."):
        Journal(path, HEADER)


def test_one_process_writes_at_a_time(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path, HEADER), pytest.raises(ConfigError, match="another process is writing"):
        Journal(path, HEADER)
