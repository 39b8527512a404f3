"""A run that hangs is ended, and says where it hung."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain import cli
from posttrain.train import watchdog
from posttrain.train.watchdog import HUNG, Watchdog

HANGS = """
import sys, threading
from pathlib import Path
from posttrain.train.watchdog import Watchdog

def waits_for_ever():
    threading.Event().wait()

def holds_the_lock():
    import re
    re.match("(a+)+$", "a" * 60 + "b")

threading.Thread(target=waits_for_ever, daemon=True).start()
dog = Watchdog(Path(sys.argv[1]), 0.3, 0.6, process=3)
dog.step(7)
holds_the_lock() if sys.argv[2] == "C" else waits_for_ever()
"""


def hang(folder: Path, where: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", HANGS, str(folder), where]
    return subprocess.run(line, text=True, capture_output=True, timeout=120)


def test_all_stacks_go_to_stderr_and_to_a_file_and_the_run_ends(tmp_path: Path) -> None:
    done = hang(tmp_path, "python")
    assert done.returncode == HUNG
    assert "nothing has ended for 0.3 s (after step 7): faults.watchdog" in done.stderr
    assert done.stderr.count("in waits_for_ever") == 2
    (file,) = (tmp_path / "stacks").iterdir()
    assert file.name.endswith("_3.txt")
    assert file.read_text() == done.stderr


def test_c_code_that_lets_no_thread_run_is_no_way_out(tmp_path: Path) -> None:
    done = hang(tmp_path, "C")
    assert done.returncode == 1
    assert "in holds_the_lock" in done.stderr
    assert "in waits_for_ever" in done.stderr


def test_the_code_is_one_that_may_be_tried_again() -> None:
    assert HUNG not in (0, cli.USAGE_ERROR, cli.PREEMPTED)
    assert f"  {HUNG}   hung (faults.watchdog)" in cli.EXIT_CODES


def test_what_goes_on_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, what is slow, words in between: each alone keeps it quiet; without them it bites."""
    bitten, looked, now = threading.Event(), threading.Semaphore(0), [0.0]
    monkeypatch.setattr(os, "_exit", lambda _: bitten.set())
    monkeypatch.setattr(watchdog, "_stderr", lambda: sys.__stdout__)
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(
        monotonic=lambda: now[0], strftime=lambda *_: "then", gmtime=lambda: None
    ))  # fmt: skip
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later",
                        lambda *_, **__: looked.release())  # fmt: skip

    def after(seconds: float) -> bool:
        """Whether it bit, once it has looked twice at that later time."""
        now[0] += seconds
        while looked.acquire(blocking=False):
            pass
        assert looked.acquire(timeout=60)
        assert looked.acquire(timeout=60)
        return bitten.is_set()

    dog = Watchdog(tmp_path, 0.4, 60.0)
    try:
        for _ in range(3):
            assert not after(0.3)
            dog.step(1)
            assert not after(0.3)
            dog.alive()
        with dog.slow("a save"):
            assert not after(59)
        assert not after(0.3)
        assert after(0.3)
    finally:
        dog.close()
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_none_watches_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    dog = Watchdog(tmp_path, None, 60.0)
    assert threading.active_count() == before
    dog.step(1)
    dog.close()
