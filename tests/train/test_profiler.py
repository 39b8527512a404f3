"""Profiles: of the steps that were chosen, and of the next ones when a signal or a file asks."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from pathlib import Path

import jax
import pytest

from posttrain.metrics import LogConfig
from posttrain.train import profiler
from posttrain.train.profiler import Profiler


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: found.append("on"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("off"))
    return found


@pytest.mark.parametrize(
    ("asked", "made", "traced"),
    [
        ((2, 3), range(1, 6), [2, 3]),
        ((2, 3), range(3, 6), [3]),  # resumed inside
        ((2, 9), range(1, 6), [2, 3, 4, 5]),  # the run ends first
        ((7, 9), range(1, 6), []),
        ((1, 2), range(4, 6), []),  # resumed behind it
        (None, range(1, 6), []),
    ],
)
def test_the_profiler_is_on_for_the_steps_asked_and_always_put_off(
    events: list[str], asked: tuple[int, int] | None, made: range, traced: list[int]
) -> None:
    seen = []
    trace = Profiler(Path("x"), LogConfig(trace_steps=asked), lambda _: None, poll=False)
    for step in made:
        trace.before(step, None)
        if events[-1:] == ["on"]:
            seen.append(step)
        trace.after(step, None)
    trace.close()
    assert seen == traced
    assert events == (["on", "off"] if traced else [])


def test_a_trace_holds_the_work_of_its_steps_alone(tmp_path: Path) -> None:
    """What docs/performance.md reads: events of the compiled program, with the module's name."""
    programs = {}
    for step in range(1, 5):

        def work(x: jax.Array, times: int = step) -> jax.Array:
            return x @ x * times

        work.__name__ = f"step_{step}"
        programs[step] = jax.jit(work)
    said: list[str] = []
    trace = Profiler(tmp_path, LogConfig(trace_steps=(2, 3)), said.append, poll=False)
    x = jax.numpy.ones((64, 64))
    for step, program in programs.items():
        trace.before(step, x)
        x = program(x)
        trace.after(step, x)
    (written,) = tmp_path.glob("trace/plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(written.read_bytes()))["traceEvents"]
    modules = {event.get("args", {}).get("hlo_module") for event in events} - {None}
    assert modules == {"jit_step_2", "jit_step_3"}
    assert said == [f"profile of steps 2 to 3: {tmp_path / 'trace'}"]


@pytest.mark.parametrize("by", ["signal", "file"])
def test_the_next_steps_are_traced_when_somebody_asks(
    tmp_path: Path, events: list[str], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "_POLL", 0.01)
    before = signal.getsignal(signal.SIGUSR1)
    said: list[str] = []
    trace = Profiler(tmp_path, LogConfig(profile_steps=2), said.append)
    on: list[int] = []
    for step in range(1, 9):
        if step in (2, 6):  # asked twice
            if by == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            else:
                (tmp_path / "profile").touch()
                while (tmp_path / "profile").exists() or not trace._asked.is_set():
                    time.sleep(0.005)
        trace.before(step, None)
        on += [step] if events[-1:] == ["on"] else []
        trace.after(step, None)
    trace.close()
    assert on == [2, 3, 6, 7]
    assert [line.split(":")[0] for line in said] == [
        "profile of steps 2 to 3", "profile of steps 6 to 7"
    ]  # fmt: skip
    assert signal.getsignal(signal.SIGUSR1) is before
