"""Tokenised examples on disk: ArrayRecord files with an index, whole or not there at all.

A record is the example's tokens (int32) followed by its loss weights (float32), little-endian. The
folder is written under another name and renamed when it is whole: what is killed half-way is never
taken for a cache, and of two that prepare at once the first to finish wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.report import Report
from posttrain.types import Example

VERSION = 3
INDEX = "index.json"  # written last; a folder without it is not a cache
REPORT = "report.json"
ARRAYS = {"lengths": "i4", "trained": "i4", "source_ids": "i4", "file_ids": "i4", "lines": "i8"}
ARRAYS |= {"margins": "f4", "labels": "i1"}
SHARD_BYTES = 1 << 30
_WRITE_OPTIONS = "group_size:1,snappy"  # zstd: half the size at four times the CPU time
_READ_OPTIONS = "readahead_buffer_size:0"  # random access: what follows is not wanted


class Cache:
    """Random access to prepared examples, from any thread.

    lengths int32 [N] tokens; trained int32 [N] tokens with weight > 0; source_ids int32 [N], into
    source_names. sides: 1; 2 where examples 2p and 2p + 1 are the chosen and the rejected side of
    pair p, or an answer and its mismatched twin. content: a hash of every token and weight, in
    order.
    """

    def __init__(self, folder: Path, index: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.folder = folder
        self.fingerprint: str = index["fingerprint"]
        self.sides: int = index["sides"]
        self.content: str = index["content"]
        self.source_names: list[str] = index["source_names"]
        self.lengths = arrays["lengths"]
        self.trained = arrays["trained"]
        self.source_ids = arrays["source_ids"]
        self._files: list[str] = index["files"]
        self._file_ids, self._lines = arrays["file_ids"], arrays["lines"]
        self._margins, self._labels = arrays["margins"], arrays["labels"]
        self._shards: list[str] = [shard["name"] for shard in index["shards"]]
        self._starts = np.cumsum([0] + [shard["examples"] for shard in index["shards"]])
        self._readers: list[Any] = [None] * len(self._shards)
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Cache:
        """The cache in `folder`. ValueError: there is none, or a part of it is missing or short."""
        folder = Path(folder)
        try:
            index = json.loads((folder / INDEX).read_text())
        except FileNotFoundError:
            raise ValueError(f"{folder}: no prepared data ({INDEX} is missing)") from None
        if index.get("version") != VERSION:
            raise ValueError(
                f"{folder}: cache version {index.get('version')}, this code reads {VERSION}; "
                "remove the folder and prepare again"
            )
        arrays = {}
        for name in ARRAYS:
            file = folder / f"{name}.npy"
            arrays[name] = np.load(file) if file.exists() else np.zeros(0)
            if len(arrays[name]) != index["examples"]:
                raise ValueError(f"{file}: missing or short; remove {folder} and prepare again")
        for shard in index["shards"]:
            file = folder / shard["name"]
            size = file.stat().st_size if file.exists() else None
            if size != shard["bytes"]:
                raise ValueError(
                    f"{file}: {size} bytes instead of {shard['bytes']}; "
                    f"remove {folder} and prepare again"
                )
        return cls(folder, index, arrays)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Example:
        return self.read([i])[0]

    def read(self, ids: Sequence[int]) -> list[Example]:
        """The examples of these ids, in this order. IndexError where there is none."""
        wanted = np.asarray(ids, np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"example {ids} of {len(self)}")
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        records: list[bytes] = [b""] * len(wanted)
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            positions = (wanted[places] - self._starts[shard]).tolist()
            for place, record in zip(places, self._reader(shard).read(positions), strict=True):
                records[place] = record
        margins, labels = self._margins[wanted].tolist(), self._labels[wanted].tolist()
        return [_decode(*made) for made in zip(records, margins, labels, strict=True)]

    def place(self, i: int) -> str:
        """Where example i came from: file:line."""
        return f"{self._files[self._file_ids[i]]}:{self._lines[i]}"

    @property
    def report(self) -> Report:
        """What prepare said when it made this."""
        return Report.load(self.folder / REPORT)

    def __reduce__(self) -> Any:
        return Cache.open, (self.folder,)

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if self._readers[shard] is None:
                from array_record.python.array_record_module import ArrayRecordReader

                self._readers[shard] = ArrayRecordReader(
                    str(self.folder / self._shards[shard]),
                    options=_READ_OPTIONS,
                    file_reader_buffer_size=1 << 15,
                )
            return self._readers[shard]


def _decode(record: bytes, margin: float, label: int) -> Example:
    half = len(record) // 2
    return Example(
        np.frombuffer(record, "<i4", count=half // 4),
        np.frombuffer(record, "<f4", offset=half),
        margin,
        label,
    )


class CacheWriter:
    """Writes one cache beside its final place; `finish` puts it there. Use as a context."""

    def __init__(
        self,
        folder: Path,
        source_names: Sequence[str],
        shard_bytes: int = SHARD_BYTES,
        *,
        sides: int = 1,
    ):
        self.folder = folder
        self.source_names = list(source_names)
        self._shard_bytes, self._sides = shard_bytes, sides
        self._content = hashlib.blake2b(digest_size=16)
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
        self._files: dict[str, int] = {}
        self._shards: list[dict[str, Any]] = []
        self._writer: Any = None
        self._written = 0  # uncompressed bytes in the open shard
        mark = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self._temporary = folder.parent / f"{folder.name}.tmp.{mark}"
        with _told(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_leavings(folder)
            self._temporary.mkdir()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(OSError, RuntimeError):  # of what is not wanted any more
            if self._writer is not None:
                self._writer.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def add(
        self,
        tokens: np.ndarray,
        weights: np.ndarray,
        lengths: np.ndarray,
        lines: np.ndarray,
        margins: np.ndarray,
        labels: np.ndarray,
        source_id: int,
        file: str,
    ) -> None:
        """Examples of one file, one after another in `tokens` and `weights` [sum(lengths)]; of
        pairs the chosen side, then the rejected one."""
        assert len(lengths) % self._sides == 0, "half a pair"
        if not len(lengths):
            return
        ends = np.cumsum(lengths)
        starts = ends - lengths
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            record = tokens[start:end].tobytes() + weights[start:end].tobytes()
            with _told(self.folder):
                self._shard().write(record)
            self._content.update(record)
            self._written += len(record)
            self._shards[-1]["examples"] += 1
        file_id = self._files.setdefault(file, len(self._files))
        n = len(lengths)
        new = {
            "lengths": lengths,
            "trained": np.add.reduceat(weights > 0, starts, dtype=np.int32),
            "source_ids": np.full(n, source_id),
            "file_ids": np.full(n, file_id),
            "lines": lines,
            "margins": margins,
            "labels": labels,
        }
        for name, values in new.items():
            self._parts[name].append(values.astype(ARRAYS[name]))

    def finish(self, fingerprint: str, report: Report) -> Cache:
        """Completes the files, renames the folder and opens it; another's, if it was faster."""
        with _told(self.folder):
            self._finish(fingerprint, report)
        return Cache.open(self.folder)

    def _finish(self, fingerprint: str, report: Report) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        arrays = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        for name, values in arrays.items():
            np.save(self._temporary / f"{name}.npy", values)
        self._content.update(arrays["lengths"].tobytes())  # where each record ends
        for shard in self._shards:
            shard["bytes"] = (self._temporary / shard["name"]).stat().st_size
        report.save(self._temporary / REPORT)
        index = {
            "version": VERSION,
            "fingerprint": fingerprint,
            "sides": self._sides,
            "content": self._content.hexdigest(),
            "examples": sum(shard["examples"] for shard in self._shards),
            "source_names": self.source_names,
            "files": list(self._files),
            "shards": self._shards,
        }
        (self._temporary / INDEX).write_text(json.dumps(index, indent=1))
        for file in self._temporary.iterdir():
            _to_disk(file)
        try:
            os.rename(self._temporary, self.folder)
        except OSError:
            if not (self.folder / INDEX).exists():
                raise

    def _shard(self) -> Any:
        """The open shard's writer; a new one where there is none or it is full."""
        if self._writer is not None and self._written < self._shard_bytes:
            return self._writer
        from array_record.python.array_record_module import ArrayRecordWriter

        if self._writer is not None:
            self._writer.close()
        name = f"{len(self._shards):05d}.array_record"
        self._shards.append({"name": name, "examples": 0})
        self._writer = ArrayRecordWriter(str(self._temporary / name), _WRITE_OPTIONS)
        self._written = 0
        return self._writer


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What keeps the cache from being written, said with its place; array_record's RuntimeErrors
    too."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"{folder}: the prepared data cannot be written ({error}). Is the disk full? Make "
            "room, or set data.cache_dir to another disk"
        ) from error


def _to_disk(file: Path) -> None:
    """A rename may reach the disk before the data it names: the data first."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leavings(folder: Path) -> None:
    """Removes what processes of this host that are no more left half-written for this cache."""
    for path in folder.parent.glob(f"{folder.name}.tmp.{socket.gethostname()}.*"):
        pid = int(path.name.rsplit(".", 2)[1])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except PermissionError:
            pass  # it lives, and is another user's
