"""Processes that compare mathematical answers by math-verify.

math-verify ends what takes too long by an alarm signal, which works in the main thread of a process
alone, and sympy keeps Python's lock for as long as it thinks. So neither is done in this process.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

from posttrain.rewards import math_worker

_START = 120.0  # seconds that a worker may take to load what it needs
_GRACE = 5.0  # seconds beyond its own time that it has to answer


class _Worker:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(math_worker.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._rest = b""
        if self._line(_START) != "ready":
            self.close()
            assert self._process.stderr is not None
            said = self._process.stderr.read().decode("utf-8", "replace").strip()[-500:]
            raise RuntimeError(f"math-verify could not be loaded: {said or 'it took too long'}")
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        assert self._process.stderr is not None
        while os.read(self._process.stderr.fileno(), 1 << 16):
            pass  # warnings of sympy; a full pipe would stop it

    def _line(self, seconds: float) -> str | None:
        """The next line it writes; None where it ends, or takes longer."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    return None
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    return None
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def ask(self, gold: str, answer: str, timeout: int) -> str | None:
        """What it says; None where it ended or took too long, and cannot be asked again."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([gold, answer, timeout]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._line(3 * timeout + _GRACE)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Pool:
    """Up to `size` workers, started when they are first needed. Thread-safe."""

    def __init__(self, size: int):
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)
        atexit.register(self.close)

    def equal(self, gold: str, answer: str, timeout: int) -> float | None:
        """1 or 0; None where the right answer cannot be read. An answer that takes too long, or
        ends its worker, is wrong. RuntimeError: math-verify does not load."""
        worker = self._idle.get()
        try:
            worker = worker or _Worker()
            said = worker.ask(gold, answer, timeout)
            if said is None:
                worker.close()
                worker = None
                return 0.0
            return {"1": 1.0, "0": 0.0}.get(said)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the workers that wait."""
        while True:
            try:
                worker = self._idle.get_nowait()
            except queue.Empty:
                return
            if worker is not None:
                worker.close()


@cache
def pool_of(size: int) -> Pool:
    """The one pool of that size."""
    return Pool(size)
