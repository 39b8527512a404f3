"""Folders that may not be written, are full, slow, lose data, or are not the same everywhere."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.agree import Channel
from posttrain.doctor import storage
from posttrain.doctor.base import Level, Subject
from tests.doctor.found import bad, found


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_MOST_BLOCKS", 2)
    monkeypatch.setattr(storage, "_BLOCK", 1 << 16)
    monkeypatch.setattr(storage, "_SLOW", 0)
    monkeypatch.setattr(storage, "_LITTLE", storage._FULL)


def test_good_folders_are_measured_and_nothing_is_left_in_them(
    subject: Subject, tmp_path: Path
) -> None:
    said = found(storage.disk, subject)
    assert not bad(said)
    assert said["run_dir"].said == f"{tmp_path / 'run_dir'} (to be made in {tmp_path})"
    assert said["run_dir, speed"].figures["bytes"] == 2 << 16
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_is_a_problem(subject: Subject) -> None:
    """Nobody may write there, not even root."""
    subject.run_dir = Path("/proc/sys/runs")
    levels = bad(found(storage.disk, subject))
    assert levels == {"run_dir, room": Level.PROBLEM, "run_dir, writing": Level.PROBLEM}
    subject.run_dir, subject.cache_dir = subject.cache_dir, subject.run_dir
    assert bad(found(storage.disk, subject))["data.cache_dir, writing"] == Level.PROBLEM


def test_a_file_in_the_folders_place_is_a_problem(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    subject.run_dir = tmp_path / "file" / "runs"
    assert bad(found(storage.disk, subject)) == {"run_dir": Level.PROBLEM}


def test_a_disk_that_fills_while_it_is_written(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write(file: int, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    all_found = found(storage.disk, subject)
    assert bad(all_found) == {"run_dir, writing": Level.PROBLEM}
    assert "No space left" in all_found["run_dir, writing"].said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "files", "level"),
    [(1 << 29, 10**6, Level.PROBLEM), (5 << 30, 10**6, Level.WARNING), (1 << 40, 3, Level.PROBLEM)],
)
def test_little_room_is_told(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, free: int, files: int, level: Level
) -> None:
    monkeypatch.setattr(storage, "_LITTLE", 20 << 30)
    stats = SimpleNamespace(
        f_bavail=free // 4096, f_blocks=1 << 30, f_frsize=4096, f_favail=files, f_files=10**7
    )
    monkeypatch.setattr(os, "statvfs", lambda place: stats)
    assert set(bad(found(storage.disk, subject)).values()) == {level}


def test_a_slow_disk_is_a_warning_with_what_saving_will_take(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(path: Path) -> tuple[int, float]:
        path.write_bytes((0).to_bytes(8, "big") + b"x")
        return 8 << 20, 4.0

    monkeypatch.setattr(storage, "_SLOW", 30e6)
    monkeypatch.setattr(storage, "write_file", slow)
    all_found = found(storage.disk, subject)
    assert bad(all_found) == {"run_dir, speed": Level.WARNING}
    finding = all_found["run_dir, speed"]
    assert finding.said.startswith("writes 2.1 MB/s")
    assert "5.72e+03 s here" in finding.todo  # 12e9 bytes at 2,097,152 a second


def test_a_disk_that_gives_back_other_bytes_is_wrong(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = storage.write_file

    def loses(path: Path) -> tuple[int, float]:
        written = write(path)
        with path.open("r+b") as file:
            file.seek((1 << 16) + 100)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        return written

    monkeypatch.setattr(storage, "write_file", loses)
    assert bad(found(storage.disk, subject)) == {"run_dir, reading": Level.WRONG}


class TwoProcesses(Channel):
    """Process 0 of two; the other one sees nothing, or everything, in its folder."""

    def __init__(self, other_sees: str | None):
        super().__init__(1)
        self._other = other_sees

    @property
    def processes(self) -> int:
        return 2

    def everybody(self, name: str, word: str) -> list[str | None]:
        return [word, self._other if name.endswith("seen") else ""]


@pytest.mark.parametrize("answer", ["yes", "no", None])
def test_a_folder_that_another_process_does_not_see(subject: Subject, answer: str | None) -> None:
    subject.channel = TwoProcesses(answer)
    problem = {f"{key}, shared": Level.PROBLEM for key in ("run_dir", "data.cache_dir")}
    assert bad(found(storage.disk, subject)) == ({} if answer == "yes" else problem)


def test_the_speed_includes_fsync(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    storage.write_file(tmp_path / "a")
    assert len(synced) == 1
