"""Rounds on disk: what was written comes back to the bit, and others are removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from posttrain.train import answers
from posttrain.train.answers import Answers, Round, RoundFiles, on_first, shared


def round_of(number: int) -> Round:
    rng = np.random.default_rng(number)
    lengths = (3, 1, 7)
    values = [[rng.normal(size=n).astype(np.float32) for n in lengths] for _ in range(4)]
    tokens = [rng.integers(0, 9, n).astype(np.int32) for n in lengths]
    answers = Answers(tokens, values[0], values[1], advantages=values[2], old_logps=values[3])
    return Round(number, 11, answers, {"reward": 0.1 + 0.2, "time/sampling": 1e-17})


def test_a_round_is_read_as_it_was_written(tmp_path: Path) -> None:
    files = RoundFiles(tmp_path / "rounds")
    assert files.read(3) is None
    files.write(round_of(3), lambda _: False)
    found, wrote = files.read(3), round_of(3)
    assert found is not None
    assert (found.number, found.position, found.metrics) == (3, 11, wrote.metrics)
    names = [name for name, _ in found.answers.known()]
    assert names == [name for name, _ in wrote.answers.known()]
    for (name, got), (_, want) in zip(found.answers.known(), wrote.answers.known(), strict=True):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name, strict=True)


def test_rounds_that_are_not_kept_go_when_the_next_is_written(tmp_path: Path) -> None:
    files = RoundFiles(tmp_path)
    for number in (0, 1, 2, 9):
        files.write(round_of(number), lambda _: True)
    files.write(round_of(3), lambda number: number == 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.npz", "3.npz"]


def test_alone_what_is_shared_is_made_here_and_errors_are_raised_as_they_are() -> None:
    assert shared(lambda: b"x") == b"x"
    with pytest.raises(KeyError, match="lost"):
        shared(lambda: {}["lost"])


def test_what_process_0_cannot_write_ends_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two processes, of which each is this one in turn."""
    sent: list[Any] = []

    def broadcast(value: Any) -> Any:
        sent.append(value)
        return sent[0]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(answers.multihost_utils, "broadcast_one_to_all", broadcast)
    (tmp_path / "file").write_text("where a folder is wanted")
    files = RoundFiles(tmp_path / "file" / "rounds")
    with pytest.raises(NotADirectoryError):
        files.write(round_of(0), lambda _: True)
    monkeypatch.setattr(answers, "is_primary", lambda: False)
    with pytest.raises(RuntimeError, match="process 0 failed"):
        files.write(round_of(0), lambda _: True)
    sent.clear()
    monkeypatch.setattr(answers, "is_primary", lambda: True)
    on_first(lambda: None)
    assert sent == [0], "nothing is sent after nothing"
