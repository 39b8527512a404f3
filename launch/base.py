"""What every backend works with: a checked launch, files and commands, shown or run."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from launch import script
from launch.code import Code
from launch.config import LaunchConfig
from launch.job import Job

# without a TPU, JAX would go on on the CPU, in silence; named, a backend that fails is an error
DEFAULT_ENV = {"JAX_PLATFORMS": "tpu,cpu"}


@dataclass(frozen=True)
class Launch:
    """A description with the job and the code that belong to it, all checked."""

    cfg: LaunchConfig
    job: Job
    code: Code

    @property
    def env(self) -> dict[str, str]:
        """The job's environment, secrets apart."""
        return DEFAULT_ENV | self.cfg.env

    def files(self, setup: str) -> dict[str, str | bytes]:
        """What travels to each host, by file name (launch/script.py)."""
        out: dict[str, str | bytes] = {script.ARCHIVE: self.code.archive}
        out |= {"job.yaml": self.job.text, "run.sh": script.RUN}
        return out | ({"setup.sh": setup} if setup else {})

    def digest(self, setup: str) -> str:
        """12 hex digits of what travels."""
        whole = hashlib.sha256()
        for name, body in sorted(self.files(setup).items()):
            whole.update(name.encode() + b"\0")
            whole.update(body if isinstance(body, bytes) else body.encode())
        return whole.hexdigest()[:12]


@dataclass(frozen=True)
class Command:
    """One command of an engine: words, never a line for a shell. `may_fail`: go on after it."""

    words: tuple[str, ...]
    stdin: str = ""
    may_fail: bool = False


@dataclass(frozen=True)
class Steps:
    """Files that are written into an empty folder, and commands that run there, one by one."""

    commands: tuple[Command, ...]
    files: Mapping[str, str | bytes] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Backend:
    """An engine: its rules (dotted key, what is wrong) and what it is asked to do."""

    tool: str
    install: str
    problems: Callable[[LaunchConfig], Iterator[tuple[str, str]]]
    create: Callable[[Launch], Steps]
    status: Callable[[LaunchConfig], Steps]
    logs: Callable[[LaunchConfig], Steps]
    stop: Callable[[LaunchConfig], Steps]


def show(steps: Steps) -> str:
    """What `execute` would do, as text. What goes to stdin is YAML, and so is what is around it."""
    out = []
    for name, body in steps.files.items():
        text = f" {len(body)} bytes" if isinstance(body, bytes) else f"\n{body.rstrip()}"
        out.append(f"# file {name}:{text}\n")
    for command in steps.commands:
        words = shlex.join(command.words)
        out.append(f"---\n# {words} <<\n{command.stdin}" if command.stdin else f"{words}\n")
    return "\n".join(out)


def execute(backend: Backend, steps: Steps) -> int:
    """Writes the files, runs the commands; the first exit code that is not 0, else 0.

    Raises ValueError if the engine's command is not installed.
    """
    if shutil.which(backend.tool) is None:
        raise ValueError(
            f"{backend.tool} is not installed here: {backend.install}; or add --dry-run, and run "
            "what it prints where it is"
        )
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        for name, body in steps.files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body if isinstance(body, bytes) else body.encode())
        for command in steps.commands:
            sys.stdout.flush()
            text = command.stdin.encode() if command.stdin else None
            code = subprocess.run(command.words, cwd=folder, input=text).returncode
            if code and not command.may_fail:
                print(f"launch: {command.words[0]} exited with {code}", file=sys.stderr)
                return code if 0 < code < 256 else 1
    return 0
