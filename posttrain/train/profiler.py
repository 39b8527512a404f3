"""Profiles of chosen steps, and of the next ones when somebody asks: a signal, or a file.

    kill -USR1 PID               log.profile_steps steps of that process
    touch <run_dir>/profile      the same of process 0, which removes the file

Traces lie in <run_dir>/trace/plugins/profile/<time>, for xprof, TensorBoard and ui.perfetto.dev.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from posttrain.metrics import LogConfig

ASKED = "profile"
"""The name of the file."""
_POLL = 2.0  # seconds between two looks for it


class Profiler:
    """On for those of log.trace_steps that this start of the run makes, and when asked.

    poll: whether to look for the file, in a thread of its own: a folder may be slow to answer.
    """

    def __init__(
        self, folder: Path, cfg: LogConfig, say: Callable[[str], None], *, poll: bool = True
    ):
        self._file, self._folder, self._say = folder / ASKED, folder / "trace", say
        self._chosen, self._length = cfg.trace_steps, cfg.profile_steps
        self._first = self._last = 0  # of the trace that is on
        self._made = False
        self._asked, self._closed = threading.Event(), threading.Event()
        self._previous: Any = None
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = signal.signal(signal.SIGUSR1, lambda *_: self._asked.set())
        self._thread: threading.Thread | None = None
        if poll:
            self._thread = threading.Thread(target=self._look, name="profile", daemon=True)
            self._thread.start()

    def before(self, step: int, wait_for: Any) -> None:
        """wait_for: the state that step begins with, so that no earlier step is in the trace."""
        if self._last:
            return
        if self._chosen and not self._made and self._chosen[0] <= step <= self._chosen[1]:
            self._made, last = True, self._chosen[1]
        elif self._asked.is_set():
            last = step + self._length - 1
            self._asked.clear()
        else:
            return
        jax.block_until_ready(wait_for)
        jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
        self._first, self._last = step, last

    def after(self, step: int, wait_for: Any) -> None:
        if step == self._last:
            jax.block_until_ready(wait_for)
            self._stop(step)

    def close(self) -> None:
        """Writes what was traced, also of a run that ends before the last of its steps."""
        self._closed.set()
        if self._last:
            self._stop(self._last)
        if self._installed:
            signal.signal(signal.SIGUSR1, self._previous)

    def _stop(self, step: int) -> None:
        first, self._first, self._last = self._first, 0, 0
        jax.profiler.stop_trace()
        self._say(f"profile of steps {first} to {step}: {self._folder}")

    def _look(self) -> None:
        while not self._closed.wait(_POLL):
            if self._file.exists():
                self._file.unlink(missing_ok=True)
                self._asked.set()
