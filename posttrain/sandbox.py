"""Runs a Python program that nobody has read, in a process of its own.

It has no network, its own view of processes and files (Python and the system's libraries,
read-only, and one folder of its own), an empty environment, and limits on time, memory, disk,
output and processes. That takes Linux 5.14 and leave to make namespaces: as root, or as a user
where the system lets users make them. Where it cannot be had, nothing is run unless `allow_network`
says that rlimits, a folder of its own and an empty environment will do. A hole in the kernel is a
hole in it, as in a container.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from posttrain import sandbox_child
from posttrain.config import Config, semantic

_GRACE = 5.0  # seconds that the supervisor has beyond the program's own time

Reason = Literal["", "time", "memory", "processes", "output"]


class Limits(Config):
    """What a program may use."""

    seconds: float = semantic(10.0, gt=0, help="time by the clock")
    cpu_seconds: int = semantic(10, gt=0, help="time of a core, of each process")
    memory_mb: int = semantic(
        512, ge=64, help="MB of address space of each process, and resident of all together"
    )
    disk_mb: int = semantic(64, gt=0, help="MB of all its files together")
    files: int = semantic(256, gt=0, help="number of files and folders")
    processes: int = semantic(16, gt=0, help="processes and threads at once")
    output_kb: int = semantic(256, gt=0, help="KB that it may print")


@dataclass(frozen=True)
class Ran:
    """How a program ended. exit: its code, -n where signal n ended it, None where a limit did."""

    stdout: str
    stderr: str
    exit: int | None
    reason: Reason  # the limit that was passed, "" for none
    seconds: float  # from the start of the supervisor on

    @property
    def ok(self) -> bool:
        """It came to its end by itself, with code 0."""
        return self.exit == 0 and not self.reason


class SandboxError(RuntimeError):
    """The program could not be run as it should be; it was not run at all."""


@cache
def _python() -> tuple[str, list[str]]:
    """The interpreter without the virtual environment, and the folders that it needs."""
    program = os.path.realpath(sys.executable)
    folders = {os.path.realpath(sys.base_prefix), os.path.dirname(os.path.dirname(program))}
    if program.startswith("/nix/"):
        folders.add("/nix")
    return program, sorted(folders, key=len)


def run_python(
    code: str,
    stdin: str = "",
    limits: Limits | None = None,
    *,
    allow_network: bool = False,
    namespaces: bool = True,
) -> Ran:
    """Runs the program with that standard input and waits for its end. Thread-safe.

    It sees Python's standard library, and nothing that was installed. namespaces: False gives up
    what they protect (for tests).
    Raises SandboxError where the program cannot be isolated.
    """
    if sys.platform != "linux":
        raise SandboxError(f"programs are run on Linux alone, and this is {sys.platform}")
    program, folders = _python()
    limits = limits or Limits()
    folder = tempfile.mkdtemp(prefix="posttrain-box-")
    spec = {
        "seconds": limits.seconds,
        "cpu_seconds": limits.cpu_seconds,
        "memory_mb": limits.memory_mb,
        "disk_mb": limits.disk_mb,
        "files": limits.files,
        "processes": limits.processes,
        "code": code,
        "stdin": stdin,
        "allow_network": allow_network,
        "namespaces": namespaces,
        "parent": os.getpid(),
        "python": program,
        "python_folders": folders,
        "folder": folder,
    }
    began = time.monotonic()
    try:
        with tempfile.TemporaryFile() as file:
            marshal.dump(spec, file)
            file.seek(0)
            out, err, told, passed = _run(program, file, limits)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if "refused" in told:
        raise SandboxError(
            f"a program cannot be cut off from the network here ({told['refused']}): run it where "
            "namespaces can be made (as root, or with kernel.unprivileged_userns_clone=1), or "
            "allow_network=true lets it run with the network and all files this user can reach"
        )
    if "error" in told:
        raise SandboxError(f"the program could not be started: {told['error']}")
    reason: Any = "output" if passed else told.get("reason", "").replace("asked", "time")
    ended = int(told["exit"]) if "exit" in told else None
    if ended == -signal.SIGXCPU:
        reason = "time"
    if ended is None and not reason:
        raise SandboxError("the supervisor of the program ended without a word: was it killed?")
    return Ran(out, err, None if reason else ended, reason, time.monotonic() - began)


def _run(program: str, spec: Any, limits: Limits) -> tuple[str, str, dict[str, str], bool]:
    """(stdout, stderr, what the supervisor told, whether the output passed its limit)."""
    report, write_end = os.pipe()
    with os.fdopen(report, "rb") as lines:
        try:
            child = subprocess.Popen(
                [program, "-I", "-S", "-B", str(Path(sandbox_child.__file__)), str(write_end)],
                stdin=spec,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(write_end,),
                start_new_session=True,
                env={},
                cwd="/",
            )
        finally:
            os.close(write_end)
        with child:
            try:
                texts, passed = _read(child, limits)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        said = [line.partition(" ") for line in lines.read().decode().splitlines()]
        told = {name: value for name, _, value in said}
    out, err = (bytes(text).decode("utf-8", "replace") for text in texts)
    return out, err, told, passed


def _read(child: subprocess.Popen[bytes], limits: Limits) -> tuple[list[bytearray], bool]:
    """What is printed, up to the limit; past it, or past all time, the supervisor is told to end
    everything, and then ended itself."""
    texts, room, passed = [bytearray(), bytearray()], limits.output_kb << 10, False
    deadline, asked = time.monotonic() + limits.seconds + _GRACE, False
    with selectors.DefaultSelector() as selector:
        for k, pipe in enumerate((child.stdout, child.stderr)):
            assert pipe is not None
            selector.register(pipe, selectors.EVENT_READ, k)
        while selector.get_map():
            for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                texts[key.data] += data[: max(room, 0)]
                room -= len(data)
            late = time.monotonic() >= deadline
            if room < 0 and not passed:
                passed = True
                child.terminate()
                deadline, asked = time.monotonic() + _GRACE, True
            elif late and not asked:
                child.terminate()
                deadline, asked = time.monotonic() + _GRACE, True
            elif late:
                child.kill()
                break
    return texts, passed
