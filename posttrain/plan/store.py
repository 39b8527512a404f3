"""Reports kept by what they are of, so that a second call is instant."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from posttrain.config import plain_dict

_SOURCES = ("optim.py", "sharding.py", "types.py", "data/plan.py", "data/pipeline.py")
_SOURCES += ("models/*.py", "losses/*.py", "plan/*.py", "train/*.py")
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
# keys that no program depends on; others that do not matter cost a compilation, no more
_IDLE = {"run_dir", "checkpoint", "log", "export", "distributed", "eval", "seed"}


def folder() -> Path:
    """Where reports lie; beside what else is kept of compilations."""
    base = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    return base / "posttrain" / "plans"


@functools.cache
def _code() -> str:
    """A hash of the source that programs, and reports of them, are made by."""
    whole, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(path for pattern in _SOURCES for path in root.glob(pattern)):
        whole.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def key_of(cfg: Any, model_folder: Path, topology: str, options: dict[str, Any]) -> str:
    """20 hex digits of all that a report depends on."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    keys = {key: value for key, value in plain_dict(cfg).items() if key not in _IDLE}
    shape = (model_folder / "config.json").read_text(encoding="utf-8")
    tokenizer = model_folder / "tokenizer.json"
    size = tokenizer.stat().st_size if tokenizer.exists() else 0
    flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    what = [keys, shape, size, topology, options, versions, flags, _code()]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:20]


def read(key: str) -> dict[str, Any] | None:
    """The report, if there is one."""
    path = folder() / f"{key}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write(key: str, report: dict[str, Any]) -> None:
    """Keeps a report; a folder that cannot be written to is no reason to fail."""
    path = folder() / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(report) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return
