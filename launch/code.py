"""The code that travels: a commit as one archive, the same bytes for the same files."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import posttrain
from posttrain.config import ConfigError

TRAVELS = ("posttrain", "pyproject.toml", "constraints.txt")
REVISION = "posttrain/REVISION"  # read by posttrain.config where there is no git
PATCH = "uncommitted.patch"


@dataclass(frozen=True)
class Code:
    """An archive (tar.gz) and what it was made of. `changed`: files that are not as committed."""

    archive: bytes
    revision: str
    changed: tuple[str, ...]


def checkout() -> Path:
    """The folder this package runs from."""
    return Path(posttrain.__file__).resolve().parents[1]


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"git cannot be asked which code this is: {error}") from error
    if done.returncode:
        raise ConfigError(
            f"{root} is no git checkout, and a job is launched from one, so that its code has a "
            f"name: {done.stderr.strip()}"
        )
    return done.stdout


def _lines(text: str) -> list[str]:
    return [name for name in text.split("\0") if name]


def _archive(root: Path, names: Sequence[str], more: dict[str, bytes]) -> bytes:
    """A tar.gz in which nothing tells when, where or by whom it was made."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted({*names, *more}):
            path = root / name
            member = tarfile.TarInfo(name)
            if name not in more and path.is_symlink():
                member.type, member.linkname = tarfile.SYMTYPE, str(path.readlink())
                tar.addfile(member)
                continue
            body = more[name] if name in more else path.read_bytes()
            member.size = len(body)
            member.mode = 0o755 if name not in more and path.stat().st_mode & 0o100 else 0o644
            tar.addfile(member, io.BytesIO(body))
    return gzip.compress(plain.getvalue(), 9, mtime=0)


def read(root: Path, more: Sequence[str], allow_dirty: bool) -> Code:
    """The code of the checkout at `root`: TRAVELS and the paths in `more`.

    Untracked files that git does not ignore count as changes. Raises ConfigError if there are
    changes and they are not allowed, if a path is not in the checkout, or if there is no git.
    """
    revision = _git(root, "rev-parse", "HEAD").strip()
    for path in more:
        inside = (root / path).resolve().is_relative_to(root) and (root / path).exists()
        if not inside or path.startswith(("/", ":", "-")):
            raise ConfigError(f"code: {path!r} is no path inside {root}")
    paths = ["--", *TRAVELS, *more]
    tracked = _lines(_git(root, "ls-files", "-z", *paths))
    new = _lines(_git(root, "ls-files", "-z", "--others", "--exclude-standard", *paths))
    differ = _lines(_git(root, "diff", "--name-only", "--no-renames", "-z", "HEAD", *paths))
    changed = tuple(sorted({*new, *differ}))
    if changed and not allow_dirty:
        listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if changed[5:] else "")
        raise ConfigError(
            f"the checkout is not as committed ({listed}): commit, so that the run's code can be "
            "found again; or allow_dirty=true, and the changes travel with it"
        )
    files = [name for name in {*tracked, *new} if (root / name).exists()]
    extra = {REVISION: (revision + ("-dirty" if changed else "") + "\n").encode()}
    if changed:
        extra[PATCH] = _git(root, "diff", "--binary", "HEAD", *paths).encode()
    return Code(_archive(root, files, extra), revision, changed)
