"""What a measured process notes of itself, on Linux; no import that costs time or memory."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from typing import Any


class Clock:
    """Wall and CPU seconds since the process was started, at the end of each step.

    To be made first of all: what other processes use of the CPUs is counted from there.
    """

    def __init__(self) -> None:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        self._started = ticks / os.sysconf("SC_CLK_TCK")  # since boot, as CLOCK_BOOTTIME
        self._made, self._others = self._now(), _busy() - self._now()["cpu"]
        self.steps: list[dict[str, Any]] = []
        self.marks: dict[str, list[dict[str, Any]]] = {}

    def step(self, **counts: Any) -> None:
        """An optimiser step is done; counts are of this step alone."""
        self.steps.append(self._now() | counts)

    def mark(self, name: str, **counts: Any) -> None:
        """Another moment worth keeping: of the batches of a reference pass, for one."""
        self.marks.setdefault(name, []).append(self._now() | counts)

    def write(self, path: str) -> None:
        """As harness.Run reads it."""
        end = self._now()
        available = (end["wall"] - self._made["wall"]) * (os.cpu_count() or 1)
        found = {
            "steps": self.steps,
            "marks": self.marks,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "others": max(0.0, _busy() - end["cpu"] - self._others) / available,
        }
        Path(path).write_text(json.dumps(found), encoding="utf-8")

    def _now(self) -> dict[str, float]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        # children are data workers: a cost of the run too, known once they have ended
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = used.ru_utime + used.ru_stime + ended.ru_utime + ended.ru_stime
        return {"wall": time.clock_gettime(time.CLOCK_BOOTTIME) - self._started, "cpu": cpu}


def _busy() -> float:
    """CPU seconds that the whole machine has spent on processes since it was started."""
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")
