"""The cache's key: a hash of everything that decides what is in it.

Data (the bytes of the files), settings, template and tokenizer, the code that turns rows into
tokens, and the versions of the libraries under it. Where the files lie does not matter.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
import uuid
from importlib.metadata import version
from pathlib import Path

import posttrain
from posttrain.chat.template import ChatTemplate
from posttrain.data.config import DataConfig
from posttrain.data.sources import digest, kind_of
from posttrain.mirror import local_of
from posttrain.types import DataKind

_CODE = ("chat", "data/formats", "data/normal.py", "data/rows.py", "data/fit.py")
_CODE += ("data/tokenise.py", "data/sources.py", "data/cache.py")
_LIBRARIES = ("tokenizers", "jinja2")
_SETTLED = 2.0  # seconds after which a changed file must show another time of change


def fingerprint(
    cfg: DataConfig,
    chat: ChatTemplate,
    files: dict[str, list[str]],
    *,
    kind: DataKind = "samples",
) -> str:
    """32 hex digits. `files`: source name -> its files; digests are remembered in cache_dir."""
    memory = local_of(cfg.cache_dir) / "digests"
    sources = [
        {
            "name": name,
            # how much of a source is drawn is the plan's business, not the cache's
            "config": source.model_dump(mode="json", exclude={"path", "weight", "repeats"}),
            "format": _outside(source.format),
            "files": [(kind_of(file), _digest(file, memory)) for file in files[name]],
        }
        for name, source in cfg.sources.items()
    ]
    parts = {
        "sources": sources,
        "settings": [cfg.seq_len, cfg.too_long, cfg.on_bad_row, kind],
        "twins": cfg.kl_block if kind == "twinned" else None,
        "chat": chat.fingerprint(),
        "code": _code(),
        "libraries": [version(name) for name in _LIBRARIES],
    }
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _code() -> str:
    """A hash of our own files that decide the tokens: an edited format makes a new cache."""
    root = Path(posttrain.__file__).parent
    state = hashlib.blake2b(digest_size=16)
    for part in _CODE:
        path = root / part
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            state.update(file.name.encode() + b"\0" + file.read_bytes())
    return state.hexdigest()


def _outside(name: str) -> str | None:
    """A hash of the module of a format `pkg.module:NAME`; None for one of ours."""
    if ":" not in name:
        return None
    try:
        found = importlib.util.find_spec(name.split(":")[0])
    except ImportError:  # a package above it is not there
        found = None
    if found is None or found.origin is None:
        return None  # using it will say what is wrong
    return hashlib.blake2b(Path(found.origin).read_bytes(), digest_size=16).hexdigest()


def _digest(file: str, memory: Path) -> str:
    """The digest of a file; of a local one it is remembered by what a change cannot leave alone."""
    if "://" in file:
        return digest(file)
    stat = os.stat(file)
    name = hashlib.blake2b(os.path.abspath(file).encode(), digest_size=16).hexdigest()
    known = memory / name
    now = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    try:
        *then, value = json.loads(known.read_text())
        if then == now:
            return value
    except (OSError, ValueError):
        pass  # not remembered
    value = digest(file)
    # a file changed a moment ago may change again without showing it
    if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED:
        # hosts share this folder, and containers share process ids
        temporary = known.with_name(f"{name}.{uuid.uuid4().hex}")
        try:
            memory.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps([*now, value]))
            temporary.replace(known)
        except OSError:  # a full disk, for one: the next start works it out again
            temporary.unlink(missing_ok=True)
    return value
