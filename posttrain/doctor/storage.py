"""The folders a run writes to: may they be written, are they shared, is there room, how fast."""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from posttrain.doctor.base import Finding, Findings, Level, Subject, duration, rate, size

_BLOCK = 8 << 20
_MOST_BLOCKS, _BUDGET = 16, 1.0  # 128 MiB, or what can be written in a second
_LITTLE, _FULL = 20 << 30, 1 << 30  # bytes free
_SLOW = 30e6  # bytes a second


def disk(on: Subject) -> Findings:
    """the folders a run writes to: room, speed (written with fsync), the same on all hosts"""
    folders = {"run_dir": on.run_dir, "data.cache_dir": on.cache_dir}
    measured: dict[int, str] = {}
    for key, folder in folders.items():
        place = existing(folder)
        said = f"{folder}" + ("" if place == folder else f" (to be made in {place})")
        if not place.is_dir():
            todo = f"set {key} to a folder"
            yield Finding(key, f"{said}: {place} is a file", Level.PROBLEM, todo)
            continue
        yield Finding(key, said)
        yield _room(key, place)
        disk = place.stat().st_dev
        if disk in measured:
            yield Finding(f"{key}, speed", f"the same disk as {measured[disk]}")
            refusal = _refusal(place)
        else:
            refusal = yield from _speed(key, place)
            measured[disk] = key
        if refusal:
            todo = f"set {key} to a folder that this user may write, or mend its rights or quota"
            yield Finding(f"{key}, writing", refusal, Level.PROBLEM, todo)
    if on.channel.processes > 1:
        for key, folder in folders.items():
            yield _shared(on, key, existing(folder))


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there; nothing is made."""
    folder = Path(os.path.abspath(folder.expanduser()))
    return next(p for p in (folder, *folder.parents) if p.exists())


def _room(key: str, place: Path) -> Finding:
    stats = os.statvfs(place)
    free, total = stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize
    files = stats.f_favail
    said = f"{size(free)} free of {size(total)}"
    level, todo = Level.OK, ""
    if free < _FULL:
        level, todo = Level.PROBLEM, f"free some, or set {key} to a larger disk"
    elif stats.f_files and files < 1000:
        level, said = Level.PROBLEM, f"{said}, and room for {files} more files alone"
        todo = f"remove files, or set {key} to another disk"
    elif free < _LITTLE:
        level = Level.WARNING
        todo = (
            "a checkpoint takes 12 bytes a parameter (float32 weights and AdamW's moments), and "
            "checkpoint.keep of them are kept"
        )
    return Finding(f"{key}, room", said, level, todo, {"free_bytes": free, "total_bytes": total})


def _speed(key: str, place: Path) -> Iterator[Finding]:
    """Yields the speeds; returns why nothing could be written, or ""."""
    path = _own_file(place)
    try:
        written, writing = write_file(path)
        reading, same = read_file(path)
        small = statistics.median(_small_file(path) for _ in range(5))
    except OSError as error:
        return f"{error.strerror or error} ({place})"
    finally:
        path.unlink(missing_ok=True)
    if not same:
        todo = f"set {key} to another disk: this one loses data"
        yield Finding(f"{key}, reading", "not what was written", Level.WRONG, todo)
    slow = written / writing < _SLOW
    yield Finding(
        f"{key}, speed",
        f"writes {rate(written, writing)}, reads {rate(written, reading)} ({size(written)}), a "
        f"small file in {duration(small)}; all with fsync",
        Level.WARNING if slow else Level.OK,
        f"saving will take long: a billion parameters are 12 GB, "
        f"{duration(12e9 / (written / writing))} here; set {key} to a faster disk"
        if slow
        else "",
        {"bytes": written, "write_s": writing, "read_s": reading, "small_file_s": small},
    )
    return ""


def _refusal(place: Path) -> str:
    path = _own_file(place)
    try:
        _small_file(path)
    except OSError as error:
        return f"{error.strerror or error} ({place})"
    finally:
        path.unlink(missing_ok=True)
    return ""


def _own_file(place: Path) -> Path:
    return place / f".posttrain-doctor-{uuid.uuid4().hex}"


def write_file(path: Path) -> tuple[int, float]:
    """(bytes, seconds) of a new file of numbered blocks, fsync included."""
    block, blocks = os.urandom(_BLOCK), 0  # a disk that compresses must not shine
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        while blocks < _MOST_BLOCKS and time.perf_counter() - began < _BUDGET:
            _write_all(file.fileno(), blocks.to_bytes(8, "big") + block[8:])
            blocks += 1
        os.fsync(file.fileno())
    return blocks * _BLOCK, time.perf_counter() - began


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def read_file(path: Path) -> tuple[float, bool]:
    """(seconds, are the blocks those of write_file), from the disk where the kernel allows it."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, number, same, tail = time.perf_counter(), 0, True, None
        while block := file.read(_BLOCK):
            tail = tail or block[8:]
            same &= block[:8] == number.to_bytes(8, "big") and block[8:] == tail
            number += 1
        return time.perf_counter() - began, same


def _small_file(path: Path) -> float:
    began = time.perf_counter()
    with path.open("wb") as file:
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def _shared(on: Subject, key: str, place: Path) -> Finding:
    """Whether the other processes see in their folder what process 0 puts into its."""
    marker = _own_file(place)
    name = f"disk/{key}"
    try:
        if on.channel.process == 0:
            try:
                marker.touch()
            except OSError:
                marker = Path("-")  # told by the check of writing
        words = on.channel.everybody(f"{name}/marker", marker.name)
        seen = words[0] is not None and (place / words[0]).exists()
        answers = on.channel.everybody(f"{name}/seen", "yes" if seen else "no")
    finally:
        if on.channel.process == 0 and marker.name != "-":
            marker.unlink(missing_ok=True)
    if words[0] == "-":
        return Finding(f"{key}, shared", "not known: process 0 may not write it", Level.WARNING,
                       "see the problem with writing")  # fmt: skip
    blind = [str(i) for i, word in enumerate(answers) if word != "yes"]
    if blind:
        todo = f"set {key} to a folder that every host has mounted"
        said = f"process {', '.join(blind)} does not see process 0's file in {place}"
        return Finding(f"{key}, shared", said, Level.PROBLEM, todo)
    return Finding(f"{key}, shared", f"all {len(answers)} processes see it")
