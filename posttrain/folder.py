"""A run's folder while a start trains in it: no other start does, and its files are at hand."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from posttrain import mirror
from posttrain.config import ConfigError


def make_folder(run_dir: Path) -> None:
    """Raises ConfigError where it cannot be made."""
    if not_folder := next((p for p in (run_dir, *run_dir.parents) if p.is_file()), None):
        raise ConfigError(f"run_dir {run_dir}: {not_folder} is a file: choose another folder")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except PermissionError as error:
        raise ConfigError(f"run_dir {run_dir}: may not be made here: choose another") from error


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Inside, no other start may train in the folder: two would write over each other's files.

    The lock is the kernel's and ends with the process, however it ends. A file system that has no
    locks is taken as it is, and of a run in a store other machines see no lock. Raises ValueError,
    with the holder, if the folder is held.
    """
    if jax.process_index():
        yield
        return
    make_folder(run_dir)
    with (run_dir / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(
                f"run_dir {run_dir}: another start of this run is at work in it ({file.read()}): "
                "wait for its end, or choose another run_dir"
            ) from error
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextmanager
def at_work(cfg: Any) -> Iterator[Any]:
    """Inside, this start alone trains in cfg.run_dir; the config, with the folder to work in.

    Raises what `held` does, and ConfigError where a store cannot be reached.
    """
    part = str(jax.process_index()) if mirror.is_url(cfg.run_dir) else ""
    folder = mirror.local_of(cfg.run_dir, part)
    with held(folder), mirror.opened(cfg, folder) as cfg:
        yield cfg
