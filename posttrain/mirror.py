"""A run's folder in an object store, worked in on this machine.

An object store cannot append to a file, lock it or rename it. So where run_dir is gs://BUCKET/..,
Orbax writes checkpoints there itself, and all other files are made in a folder of this machine:
process 0 brings what has changed to the store before each checkpoint and at the end of the run, and
a start first gets what it goes on from. A crash loses what came after the last checkpoint, which is
made again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from posttrain.config import ConfigError

_NEEDED = ("rounds",)  # the subfolders that a start goes on from
_STAYS = ("lock", "profile")  # what is this machine's alone; the profiler removes its own
_NOT_SENT_YET = ("stacks",)  # of a run that hung: it had no time
_CHUNK = 1 << 24  # bytes that are in memory while a file travels
_ATTEMPTS = 4


def is_url(path: Any) -> bool:
    """Whether it names a place in a store, and not a folder."""
    return bool(re.match(r"[a-z][a-z0-9]*://", str(path)))


def at(url: Any) -> Any:
    """An etils path, which has pathlib's methods. ConfigError where this scheme is unknown."""
    from etils import epath

    try:
        path = epath.Path(str(url))
        path.exists()
    except KeyError as error:
        raise ConfigError(f"{url}: no store is known by {error}; gs:// is one") from error
    except ImportError as error:  # of gs:// from fsspec, with its own words on what to install
        raise ConfigError(f"{url}: {error}; for gs:// pip install 'posttrain[gcs]'") from error
    return path


def refresh(path: Any) -> None:
    """Before a look at what others may have written: fsspec remembers what was where."""
    from etils.epath import backend

    with suppress(ImportError):  # tensorflow is at work instead, which remembers nothing
        backend.fsspec_backend.fs(str(path)).invalidate_cache()


def local_of(path: Any, part: str = "") -> Path:
    """The folder of this machine for a URL, a part of it for each `part`; a folder is its own."""
    if not is_url(path):
        return Path(path).expanduser()
    text = str(path).rstrip("/")
    name = f"{PurePosixPath(text).name}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "posttrain" / "stores" / (f"{name}-{part}" if part else name)


class _Kept:
    """A local folder and its place in the store. stamps: of what both have, by its local path."""

    def __init__(self, store: Any):
        self.store = store
        self.stamps: dict[Path, tuple[int, int]] = {}


_kept: dict[Path, _Kept] = {}


@contextmanager
def opened(cfg: Any, local: Path) -> Iterator[Any]:
    """The config with `local` as its run_dir, where that was a URL; its files come and go.

    local: this process's folder, emptied but for its lock: what the store has is what counts.
    """
    if not is_url(cfg.run_dir):
        yield cfg
        return
    kept = _Kept(at(cfg.run_dir))
    _empty(local)
    if kept.store.exists():
        for name in ("", *_NEEDED):
            _get(kept, local, name)
    _kept[local] = kept
    try:
        yield cfg.model_copy(update={"run_dir": local})
    finally:
        try:
            push(local)
        finally:
            del _kept[local]


def home_of(run_dir: Path) -> Any:
    """Where a run's folder is kept: its place in the store, or the folder itself."""
    return _kept[run_dir].store if run_dir in _kept else run_dir


def as_given(cfg: Any) -> Any:
    """The config with the run_dir that its user named."""
    run_dir = vars(cfg).get("run_dir")
    return cfg.model_copy(update={"run_dir": home_of(run_dir)}) if run_dir in _kept else cfg


def push(run_dir: Path) -> None:
    """Brings what is new or has changed to the store, where there is one; process 0 alone does.

    What is gone here goes there. Raises OSError where the store does not take it.
    """
    import jax

    kept = _kept.get(run_dir)
    if kept is None or jax.process_index():
        return
    here = {
        file: _stamp(file)
        for file in sorted(run_dir.rglob("*"))
        if file.is_file() and file.suffix != ".tmp" and file.name not in _STAYS
    }
    for file, stamp in here.items():
        if kept.stamps.get(file) != stamp:
            _again(send, file, kept.store / file.relative_to(run_dir).as_posix())
            kept.stamps[file] = stamp
    for file in [file for file in kept.stamps if file not in here]:
        _again(_remove, file, kept.store / file.relative_to(run_dir).as_posix())
        del kept.stamps[file]


def send(file: Path, to: Any) -> None:
    """Copies a file of this machine to a place in a store, a piece at a time."""
    with file.open("rb") as source, to.open("wb") as out:
        shutil.copyfileobj(source, out, _CHUNK)


def fetch(place: Any, file: Path) -> None:
    """The other way. A file that is there is whole: it is written under another name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with place.open("rb") as source, temporary.open("wb") as out:
        shutil.copyfileobj(source, out, _CHUNK)
    temporary.replace(file)


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


def _empty(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name not in _NOT_SENT_YET:
            shutil.rmtree(entry)
        elif entry.is_file() and entry.name not in _STAYS:
            entry.unlink()


def _get(kept: _Kept, local: Path, name: str) -> None:
    folder = kept.store / name if name else kept.store
    for place in folder.iterdir() if folder.is_dir() else ():
        if not place.is_dir():
            file = local / name / place.name
            fetch(place, file)
            kept.stamps[file] = _stamp(file)


def _remove(_: Path, place: Any) -> None:
    if place.exists():
        place.unlink()


def _again(what: Any, file: Path, place: Any) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            what(file, place)
            return
        except Exception as error:  # each store has its own
            said = f"{place}: the store does not take it ({type(error).__name__}: {error})"
            if attempt == _ATTEMPTS:
                raise OSError(f"{said}; given up after {attempt} attempts") from error
            print(f"{said}; again in {2**attempt} s", file=sys.stderr, flush=True)
            time.sleep(2**attempt)
