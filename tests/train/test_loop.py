"""What surrounds the steps: the signal to stop before and after them, and the profiler."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from posttrain.metrics import LogConfig
from posttrain.train import loop
from posttrain.train.source import Stopped


def test_sigterm_where_nothing_waits_to_be_saved_leaves_with_the_preemption_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with loop.stops_at_once(), pytest.raises(SystemExit) as left:
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == loop.PREEMPTED == 75
    assert "told to stop" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_between_first_and_last_step_sigterm_is_only_noted() -> None:
    with loop.stops_at_once():
        at_once = signal.getsignal(signal.SIGTERM)
        preemption = loop.Preemption()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached()
        preemption.close()
        assert signal.getsignal(signal.SIGTERM) is at_once


@pytest.mark.parametrize(("start", "saved"), [(0, []), (5, [5])])
def test_a_run_told_to_stop_while_it_samples_saves_what_it_has_and_leaves(
    tmp_path: Path, start: int, saved: list[int]
) -> None:
    class Sampling:
        ahead, waited = 0, 0.0

        def watch(self, stopped: Any) -> None:
            self.stopped = stopped

        def next(self, state: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            assert self.stopped()
            raise Stopped

        def save(self, step: int) -> dict[str, int]:
            return {"position": 7}

    kept: list[tuple[Any, ...]] = []
    run: Any = SimpleNamespace(
        folder=tmp_path, log=LogConfig(), total_steps=9, tokens_before=0, source=Sampling(),
        checkpoints=SimpleNamespace(save=lambda *given, wait: kept.append((*given, wait))),
    )  # fmt: skip
    state = SimpleNamespace(step=start)
    assert loop.train(run, state) == (state, True)
    assert kept == [(step, state, {"position": 7}, True) for step in saved]


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
    monkeypatch: pytest.MonkeyPatch, asked: tuple[int, int] | None, made: range, traced: list[int]
) -> None:
    events: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: events.append("on"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("off"))
    seen = []
    run: Any = type("Run", (), {"folder": Path("x"), "log": LogConfig(trace_steps=asked)})
    trace = loop._Trace(run)
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
    run: Any = type("Run", (), {"folder": tmp_path, "log": LogConfig(trace_steps=(2, 3))})
    programs = {}
    for step in range(1, 5):

        def work(x: jax.Array, times: int = step) -> jax.Array:
            return x @ x * times

        work.__name__ = f"step_{step}"
        programs[step] = jax.jit(work)
    trace, x = loop._Trace(run), jax.numpy.ones((64, 64))
    for step, program in programs.items():
        trace.before(step, x)
        x = program(x)
        trace.after(step, x)
    (written,) = tmp_path.glob("trace/plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(written.read_bytes()))["traceEvents"]
    modules = {event.get("args", {}).get("hlo_module") for event in events} - {None}
    assert modules == {"jit_step_2", "jit_step_3"}
