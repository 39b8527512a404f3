"""A run that makes no step any more: the stacks of all threads, then its end, to be started again.

A thread looks; the loop only notes that a step has ended. What takes longer than a step (a save,
an evaluation, compiling, sampling) has a longer limit. A thread of the interpreter's own
(faulthandler) stands behind it, for where nothing written in Python runs because C code holds the
lock: it writes to stderr alone and leaves with code 1.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HUNG = 70
"""Exit code of a run that made no step for too long: start it again."""


class Watchdog:
    """Watches from its making until close().

    limit: seconds without a step; None: nothing is watched. slow: seconds within `slow()`.
    process: of the run, for the name of the file, <folder>/stacks/<UTC time>_<process>.txt.
    """

    def __init__(self, folder: Path, limit: float | None, slow: float, *, process: int = 0):
        self._folder, self._limit, self._slow, self._process = folder, limit, slow, process
        self._now = (time.monotonic(), limit or 0.0, "before the first step")
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if limit is not None:
            self._pause = min(max(min(limit, slow) / 20, 0.02), 5.0)
            self._put_off()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def step(self, number: int) -> None:
        """A step has ended, on the devices too."""
        self._now = (time.monotonic(), self._limit or 0.0, f"after step {number}")

    def alive(self) -> None:
        """What takes its time goes on."""
        _, limit, what = self._now
        self._now = (time.monotonic(), limit, what)

    @contextmanager
    def slow(self, what: str) -> Iterator[None]:
        """Inside, the longer limit holds."""
        _, limit, before = self._now
        self._now = (time.monotonic(), max(self._slow, limit), f"{what}, {before}")
        try:
            yield
        finally:
            self._now = (time.monotonic(), limit, before)

    def close(self) -> None:
        if self._thread is not None:
            self._closed.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(self._pause):
            since, limit, what = self._now
            if time.monotonic() - since > limit:
                self._end(limit, what)
            self._put_off()

    def _put_off(self) -> None:
        """Again and again, as long as the thread gets to run: the interpreter's own end of it."""
        longest = max(self._limit or 0.0, self._slow)
        faulthandler.dump_traceback_later(longest + self._pause, exit=True, file=_stderr())

    def _end(self, limit: float, what: str) -> None:
        names = ", ".join(f"{t.name} 0x{t.ident or 0:016x}" for t in threading.enumerate())
        text = (
            f"watchdog: nothing has ended for {limit:g} s ({what}): faults.watchdog. The stacks of "
            f"all threads ({names}) follow, then the end with exit code {HUNG}: start again\n"
        )
        text += _stacks()
        out = _stderr()
        out.write(text)
        out.flush()
        # a folder that answers no more may be why it hangs: it is not waited for
        writes = threading.Thread(target=self._write, args=(text,), daemon=True)
        writes.start()
        writes.join(10)
        os._exit(HUNG)

    def _write(self, text: str) -> None:
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}_{self._process}.txt"
        folder = self._folder / "stacks"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _stderr() -> Any:
    """The process's own, which has a number, whatever stands in its place."""
    return sys.__stderr__ or sys.stderr


def _stacks() -> str:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
