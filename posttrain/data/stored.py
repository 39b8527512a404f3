"""Prepared data in an object store: made on one host, copied whole to every host that reads them.

Records are read by position, from files: so a store (data.cache_dir: gs://BUCKET/FOLDER, or what
else etils' epath takes) holds copies of cache folders, and each machine has its own.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from posttrain import mirror
from posttrain.data.cache import INDEX


def place(cache_dir: str, key: str) -> Any:
    """Where a cache is kept, None where cache_dir is a folder."""
    return mirror.at(cache_dir) / key if mirror.is_url(cache_dir) else None


def bring(store: Any, folder: Path) -> None:
    """Copies a cache here, if the store has one and it is not here. It is here whole, or not."""
    if store is None or (folder / INDEX).exists():
        return
    mirror.refresh(store)
    if not (store / INDEX).exists():
        return
    temporary = folder.with_name(f"{folder.name}.got.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    for file in store.iterdir():
        mirror.fetch(file, temporary / file.name)
    try:
        temporary.rename(folder)
    except OSError:  # another process of this machine was faster
        shutil.rmtree(temporary)
        if not (folder / INDEX).exists():
            raise


def keep(folder: Path, store: Any) -> None:
    """Copies a cache to the store, which has it when its index is there: that goes last."""
    if store is None or (store / INDEX).exists():
        return
    for file in sorted(folder.iterdir(), key=lambda file: file.name == INDEX):
        mirror.send(file, store / file.name)
