"""Rows written as prompts are done with, in a way that survives a SIGKILL at any point.

Beside the file of rows stands <file>.progress: what the rows come from, then a line for each prompt
that is done with, and where its rows end. A line counts once it is whole; rows that no line stands
for are cut off and made again. So the file is the same as one that was written in one go.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from posttrain.config import ConfigError


class Journal:
    """The file of rows and its progress, open for one process.

    `done`: the lines of the prompts that are done with, in order, as `append` was given them.
    ConfigError: the file is another's, or another run writes to it.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.path, self.beside = path, path.with_name(path.name + ".progress")
        self.done: list[dict[str, Any]] = []
        if path.is_dir() or path.suffix not in (".jsonl", ".ndjson"):
            raise ConfigError(f"out is {path}: name a file that ends in .jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not self.beside.exists():
            raise ConfigError(f"out: {path} is there, and not of this command: name another")
        self._lines = self.beside.open("a+b")
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lines.close()
            raise ConfigError(f"out: another process is writing {path}") from error
        self._rows = path.open("a+b")
        try:
            self._end = self._take_up(header)
        except ConfigError:
            self.close()
            raise

    def _take_up(self, header: Mapping[str, Any]) -> int:
        """Where the rows end; nothing that counts for less than a prompt is left in either file."""
        self._lines.seek(0)
        *whole, _ = self._lines.read().split(b"\n")
        if not whole:
            _cut(self._lines, 0)
            _add(self._lines, _line(header))
            _cut(self._rows, 0)
            _keep_names(self.path.parent)
            return 0
        first, *self.done = map(json.loads, whole)
        differ = [key for key in {**first, **header} if first.get(key) != header.get(key)]
        if differ:
            was = [f"{key} = {json.dumps(first.get(key))} (now {json.dumps(header.get(key))})"
                   for key in differ]  # fmt: skip
            raise ConfigError(
                f"out: {self.path} was begun otherwise: name another out, or set again\n    "
                + "\n    ".join(was)
            )
        end = self.done[-1]["end"] if self.done else 0
        if os.fstat(self._rows.fileno()).st_size < end:
            raise ConfigError(
                f"out: {self.path} is shorter than it was: remove it and {self.beside.name} to "
                "begin anew"
            )
        _cut(self._lines, sum(len(line) + 1 for line in whole))
        _cut(self._rows, end)
        return end

    def append(self, rows: Sequence[Mapping[str, Any]], line: Mapping[str, Any]) -> None:
        """A prompt is done with: its rows, and what is to be known of it later. On disk when this
        returns."""
        data = b"".join(map(_line, rows))
        if data:
            _add(self._rows, data)
        self._end += len(data)
        self.done.append({**line, "end": self._end})
        _add(self._lines, _line(self.done[-1]))

    def close(self) -> None:
        """The lock goes with the file."""
        self._rows.close()
        self._lines.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(value: Mapping[str, Any]) -> bytes:
    """JSON and a line feed; a lone surrogate is written as JSON names it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _add(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _cut(file: IO[bytes], size: int) -> None:
    file.truncate(size)
    file.seek(0, os.SEEK_END)


def _keep_names(folder: Path) -> None:
    """The names of new files outlive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
