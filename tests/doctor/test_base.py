"""A check that crashes, hangs or lacks its devices is told, and the next one runs."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import jax
import pytest

from posttrain.doctor import CHECKS
from posttrain.doctor.base import (
    Finding,
    Findings,
    Level,
    NotRun,
    Result,
    Subject,
    duration,
    examine,
    median_seconds,
    rate,
    size,
)


def test_a_crash_keeps_what_was_found_before_and_names_the_reason(subject: Subject) -> None:
    def check(on: Subject) -> Findings:
        yield Finding("first", "fine")
        raise KeyError("no such link")

    result, hangs = examine("links", check, subject, 5)
    assert not hangs
    assert [f.what for f in result.findings] == ["first", "links"]
    crash = result.findings[1]
    assert crash.level == Level.PROBLEM
    assert "KeyError: 'no such link' (test_base.py:" in crash.said
    assert "Traceback" in crash.figures["traceback"]
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_a_check_that_hangs_is_left_and_takes_the_devices_with_it(subject: Subject) -> None:
    forever = threading.Event()

    def stuck(on: Subject) -> Findings:
        yield Finding("first", "fine")
        forever.wait(60)

    def later(on: Subject) -> Findings:
        yield Finding("devices", str(len(on.local_devices())))

    def hostly(on: Subject) -> Findings:
        yield Finding("host", "fine")

    result, hangs = examine("collectives", stuck, subject, 0.2)
    assert hangs
    assert [f.level for f in result.findings] == [Level.OK, Level.PROBLEM]
    assert "no end after 0.2 s" in result.findings[1].said
    (skipped,) = examine("matmul", later, subject, 5)[0].findings
    assert skipped.level == Level.WARNING
    assert skipped.said == "not run: the check of collectives hangs on them"
    assert examine("host", hostly, subject, 5)[0].findings[0].level == Level.OK
    forever.set()


def test_devices_that_cannot_be_had_are_a_problem_once(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> list:
        raise RuntimeError("The TPU is already in use by process with pid 7")

    monkeypatch.setattr(jax, "local_devices", none)
    with pytest.raises(RuntimeError, match="already in use"):
        subject.local_devices()
    with pytest.raises(NotRun, match="no device can be used"):
        subject.local_devices()


def test_every_check_says_in_a_line_what_it_looks_at() -> None:
    for check in CHECKS.values():
        line = (check.__doc__ or "").splitlines()[0]
        assert 10 < len(line) < 90


def test_numbers_carry_their_units() -> None:
    assert (size(512), size(3 << 20), size(5 << 30)) == ("512 B", "3 MiB", "5.0 GiB")
    assert rate(3e9, 2) == "1.5 GB/s"
    assert rate(3e6, 0.1) == "30 MB/s"
    assert (duration(2.5), duration(0.0042), duration(7e-6)) == ("2.5 s", "4.2 ms", "7 µs")


def test_the_median_is_of_calls_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0])  # calls of 1, 3 and 2 seconds
    monkeypatch.setattr("posttrain.doctor.base.time.perf_counter", lambda: next(clock))
    calls: list[int] = []
    assert median_seconds(lambda: calls.append(1), times=3) == 2.0
    assert len(calls) == 5


def test_an_interrupted_check_removes_what_it_wrote(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote = threading.Event()

    def check(on: Subject) -> Findings:
        (tmp_path / "probe").touch()
        wrote.set()
        time.sleep(0.2)
        (tmp_path / "probe").unlink()
        yield Finding("disk", "fine")

    join = threading.Thread.join
    calls = iter([KeyboardInterrupt])

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        wrote.wait(5)
        if stroke := next(calls, None):
            raise stroke
        join(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        examine("disk", check, subject, 60)
    assert not (tmp_path / "probe").exists()
