"""What surrounds the steps: the signal to stop, before and after them and while they wait."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.metrics import LogConfig
from posttrain.train import loop
from posttrain.train.config import FaultsConfig
from posttrain.train.reporter import evaluation_line
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
        folder=tmp_path, log=LogConfig(), total_steps=9, tokens_before=3, source=Sampling(),
        checkpoints=SimpleNamespace(
            save=lambda *given, wait: kept.append((*given, wait)), notes=lambda _: {}
        ),
        writer=SimpleNamespace(write=lambda *_: None), faults=FaultsConfig(), began=0.0,
    )  # fmt: skip
    state = SimpleNamespace(step=start)
    assert loop.train(run, state) == (state, True)
    assert kept == [(step, state, {"position": 7}, {"tokens": 3}, True) for step in saved]


def test_the_terminal_shows_of_an_evaluation_what_one_looks_for() -> None:
    found = {"eval/a/loss": 0.5, "eval/a/tokens": 9.0, "eval/a/accuracy": 0.25, "eval/b/loss": 1.0}
    assert evaluation_line(3, found) == (
        "evaluation at step 3: eval/a/loss 0.5000, eval/a/accuracy 0.2500, eval/b/loss 1.0000"
    )
