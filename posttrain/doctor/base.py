"""What a check is, what it finds, and how one is run so that its failing stops no other.

A check is a generator function `Subject -> Findings`; the first line of its docstring is the line
printed while it runs. It yields as it goes, so that what was found before a crash is kept. In a run
of several processes every process runs every check, in the same order.
"""

from __future__ import annotations

import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import jax

from posttrain.agree import Channel
from posttrain.sharding import MeshConfig


class Level(IntEnum):
    """How bad a finding is; from PROBLEM on the doctor exits with 1."""

    OK = 0
    WARNING = 1  # worth knowing; nothing fails of it
    PROBLEM = 2  # a run will fail or be crippled
    WRONG = 3  # a run would go on and compute something wrong


@dataclass(frozen=True)
class Finding:
    """One line of the report. `figures` are the numbers in it, under names that give the unit."""

    what: str
    said: str
    level: Level = Level.OK
    todo: str = ""  # what to do; of every level but OK
    figures: dict[str, Any] = field(default_factory=dict)


Findings = Iterator[Finding]


class NotRun(Exception):
    """A check could not be made, for a reason that is reported elsewhere."""


@dataclass
class Subject:
    """What is examined."""

    run_dir: Path
    cache_dir: Path
    mesh: MeshConfig
    peak_tflops: float | None  # as the user states it
    channel: Channel
    lost: str = ""  # why no device can be used

    def local_devices(self) -> list[Any]:
        """This process's devices, asked for by every check that uses one before it does.

        The first failure to get them is raised as it is, then NotRun. Programs are compiled as a
        run's are from here on, with its cache.
        """
        if self.lost:
            raise NotRun(self.lost)
        with suppress(Exception):  # the check of versions tells what cannot be imported
            from posttrain.train.setup import use_compile_cache

            use_compile_cache()
        try:
            return jax.local_devices()
        except RuntimeError:
            self.lost = "no device can be used"
            raise


Check = Callable[[Subject], Findings]


_GRACE = 10.0  # seconds in which an interrupted check may clean up


@dataclass(frozen=True)
class Result:
    """What a check found on one process."""

    check: str
    process: int
    seconds: float
    findings: list[Finding]

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Result:
        found = [Finding(**(f | {"level": Level(f["level"])})) for f in tree["findings"]]
        return cls(tree["check"], tree["process"], tree["seconds"], found)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(name: str, check: Check, on: Subject, seconds: float) -> tuple[Result, bool]:
    """Runs one check, and whether it hangs. Whatever it raises becomes a finding.

    It runs in a thread of its own: one that has not ended after `seconds` is left behind, and no
    check after it may use the devices.
    """
    found: list[Finding] = []
    began = time.monotonic()

    def run() -> None:
        try:
            for finding in check(on):
                found.append(finding)
        except NotRun as reason:
            found.append(Finding(name, f"not run: {reason}", Level.WARNING, "see the problems"))
        except Exception as error:
            found.append(_crashed(name, error))

    thread = threading.Thread(target=run, name=f"doctor {name}", daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    except KeyboardInterrupt:
        thread.join(_GRACE)  # it removes what it wrote
        raise
    hangs = thread.is_alive()
    kept = list(found)
    if hangs:
        on.lost = f"the check of {name} hangs on them"
        todo = (
            "look at the machines of the other processes and the network between them; on one "
            "machine, restart it; on a slow one, try time_limit=600"
        )
        said = f"no end after {seconds:g} s"
        kept.append(Finding(name, said, Level.PROBLEM, todo, {"time_limit_s": seconds}))
    result = Result(name, on.channel.process, round(time.monotonic() - began, 3), kept)
    return result, hangs


def _crashed(name: str, error: Exception) -> Finding:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Finding(
        name,
        f"failed: {type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})",
        Level.PROBLEM,
        "the message says what refused; json=FILE holds the traceback",
        {"traceback": "".join(traceback.format_exception(error))},
    )


def median_seconds(call: Callable[[], Any], *, times: int = 0, budget: float = 0.4) -> float:
    """Median over several calls, each waited for; the first two (compile, warm-up) do not count.

    times: exactly so many, as several processes must agree; 0: three at least, more while the
    budget of seconds lasts.
    """
    for _ in range(2):
        jax.block_until_ready(call())
    taken: list[float] = []
    while len(taken) < (times or 3) or (not times and sum(taken) < budget and len(taken) < 30):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def size(n_bytes: float) -> str:
    """In binary units: 1 GiB = 2**30 bytes."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.1f} GiB"


def rate(n_bytes: float, seconds: float) -> str:
    """In decimal units: 1 GB/s = 10**9 bytes a second."""
    speed = n_bytes / seconds
    return f"{speed / 1e9:.3g} GB/s" if speed >= 1e8 else f"{speed / 1e6:.3g} MB/s"


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
