"""A step that diverges in a whole run: left out as if it had never been, before a kill and after.

The fault stands in these tests, around the compiled step: at some steps it gives back what a bad
batch makes, a loss of nan and parameters of it, or a loss that is far up.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import config
from posttrain.jobs import rl, sft
from posttrain.train import goodput, setup, spikes
from posttrain.train.state import TrainState
from posttrain.train.watchdog import Watchdog
from posttrain.types import Mean
from tests.jobs.runs import Finished, Runner

STEPS = 9
BAD = 5
KEYS = [f"train.steps={STEPS}", "checkpoint.every=3", "batch.order=shuffle"]
ROLLBACK = "faults.on_nonfinite=rollback"
Step = Callable[..., tuple[TrainState, dict[str, Any]]]


class Killed(BaseException):
    """Ends a run in these tests, at no place that it could prepare for."""


def poisoned(step: Step, bad: set[int], what: str, calls: list[int], kill_at: int) -> Step:
    """The step, but for the batches of the steps `bad`; the call `kill_at` is the last."""

    def train_step(state: TrainState, batch: Any, *others: Any) -> tuple[TrainState, Any]:
        number = int(state.step) + 1
        calls.append(number)
        if len(calls) == kill_at:
            raise Killed
        if number in bad and what == "pass":
            return spikes.passed_over(state), {"loss": jnp.float32(1), "grad_norm": jnp.float32(1),
                                               "learning_rate": jnp.float32(1)}  # fmt: skip
        state, metrics = step(state, batch, *others)
        if number in bad and what == "nan":
            worse = jax.tree.map(lambda x: x * jnp.nan, state.params)
            state = TrainState(state.step, worse, state.opt_state)
            metrics |= {"loss": Mean(jnp.float32(jnp.nan), jnp.float32(1))}
        if number in bad and what == "spike":
            metrics |= {"loss": Mean(metrics["loss"].total * 5, metrics["loss"].count)}
        return state, metrics

    return train_step


@pytest.fixture
def faulty(
    run_sft: Runner, tiny_sft: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Finished]:
    """faulty(*keys, what, bad, kill_at, folder, calls) -> the run that such a step made."""
    make = setup.train_step_fn

    def run(
        *keys: str, what: str = "nan", bad: tuple[int, ...] = (BAD,), kill_at: int = 0,
        folder: Path | None = None, calls: list[int] | None = None,
    ) -> Finished:  # fmt: skip
        made = [] if calls is None else calls
        monkeypatch.setattr(
            setup,
            "train_step_fn",
            lambda *args: poisoned(make(*args), {*bad}, what, made, kill_at),
        )
        return run_sft(*tiny_sft, *KEYS, *keys, devices=2, folder=folder)

    return run


def lines(run: Finished, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / name).read_text().splitlines()]


def assert_same(run: Finished, want: Finished) -> None:
    for name, weights in want.weights.items():
        np.testing.assert_array_equal(run.weights[name], weights, err_msg=name)
    losses = [{x["step"]: x["loss"] for x in r.metrics if x["step"] != BAD} for r in (run, want)]
    assert losses[0] == losses[1]
    assert [x["step"] for x in run.metrics] == [k for k in range(1, STEPS + 1) if k != BAD]
    assert [x["step"] for x in lines(run, "metrics.jsonl") if "skipped" in x] == [BAD]


@pytest.fixture(scope="module")
def left_out(
    run_sft: Runner, tiny_sft: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """The same run in which that batch's update was never made, and nothing went wrong."""
    make = setup.train_step_fn
    with pytest.MonkeyPatch.context() as patch:
        passing = lambda *args: poisoned(make(*args), {BAD}, "pass", [], 0)  # noqa: E731
        patch.setattr(setup, "train_step_fn", passing)
        return run_sft(*tiny_sft, *KEYS, devices=2)


def test_a_batch_that_diverges_is_left_out(
    faulty: Callable[..., Finished], left_out: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    run = faulty(ROLLBACK, calls=calls)
    assert calls == [1, 2, 3, 4, 5, 6, 4, 6, 7, 8, 9]  # 6 was under way when 5 was read
    assert_same(run, left_out)
    (line,) = lines(run, "faults.jsonl")
    assert (line["step"], line["fault"], line["loss"], line["action"], line["checkpoint"]) == (
        BAD, "nonfinite", "nan", "rollback", 3
    )  # fmt: skip
    assert len(line["examples"]) == 4
    said = capsys.readouterr().err
    assert "step 5: loss is nan: back to checkpoint 3, then on without the 4 examples" in said
    tokens = [x["num_tokens"] for x in left_out.metrics]
    other = [x["num_tokens"] for x in run.metrics]
    dropped = tokens[BAD - 1] - tokens[BAD - 2]
    assert other == tokens[: BAD - 1] + [t - dropped for t in tokens[BAD:]]
    ledger = json.loads((run.folder / goodput.FILE).read_text())
    assert ledger["seconds"]["lost"] > 0
    last = lines(run, "metrics.jsonl")[-1]
    shares = [v for k, v in last.items() if k.startswith("goodput/") and "wall" not in k]
    assert sum(shares) == pytest.approx(1)
    assert "goodput: " in said


@pytest.mark.parametrize("kill_at", [8, 10])
def test_a_run_killed_after_it_went_back_leaves_the_same_out(
    faulty: Callable[..., Finished], left_out: Finished, tmp_path: Path, kill_at: int
) -> None:
    """At the call after the batch was left out (from checkpoint 3), and from checkpoint 6 on.

    The batch stays out though nothing is wrong with it any more.
    """
    with pytest.raises(Killed):
        faulty(ROLLBACK, kill_at=kill_at, folder=tmp_path)
    assert_same(faulty(ROLLBACK, bad=(), folder=tmp_path), left_out)
    assert len(lines(Finished(0, tmp_path), "faults.jsonl")) == 1


def test_a_run_that_stopped_goes_on_when_it_is_told_to_go_back(
    faulty: Callable[..., Finished], left_out: Finished, tmp_path: Path
) -> None:
    with pytest.raises(FloatingPointError, match=r"step 5: loss is nan; nothing of it was saved, "
                       r"checkpoint 3 stands\. .*preview\.step=4.*on_nonfinite"):  # fmt: skip
        faulty(folder=tmp_path)
    assert_same(faulty(ROLLBACK, folder=tmp_path), left_out)
    actions = [line["action"] for line in lines(Finished(0, tmp_path), "faults.jsonl")]
    assert actions == ["stop", "rollback"]


def test_a_spike_is_left_out_by_the_same_window_after_a_kill(
    faulty: Callable[..., Finished], tmp_path: Path
) -> None:
    """The window of 8 is full at step 8 alone, whose losses came before the kill and after."""
    keys = ["train.steps=12", "faults.on_spike=rollback", "faults.spike_window=8",
            "faults.spike_deviations=20"]  # fmt: skip
    calls: list[int] = []
    calm = faulty(*keys, what="spike", bad=(2, 10), calls=calls)
    assert [line["step"] for line in lines(calm, "faults.jsonl")] == [10]
    assert "loss is" in lines(calm, "faults.jsonl")[0]["why"]
    assert calls == [*range(1, 12), 11, 12]
    with pytest.raises(Killed):
        faulty(*keys, what="spike", bad=(2, 10), kill_at=8, folder=tmp_path)
    again = faulty(*keys, what="spike", bad=(2, 10), folder=tmp_path)
    assert [line["step"] for line in lines(again, "faults.jsonl")] == [10]
    for name, weights in calm.weights.items():
        np.testing.assert_array_equal(again.weights[name], weights, err_msg=name)


def test_a_run_goes_back_so_often_and_no_more(
    faulty: Callable[..., Finished], tmp_path: Path
) -> None:
    """Before the first checkpoint too: there is one of the beginning."""
    with pytest.raises(FloatingPointError, match=r"step 3: .*checkpoint 0 stands.*back 2 times"):
        faulty(ROLLBACK, "faults.max_rollbacks=2", bad=(1, 2, 3), folder=tmp_path)
    steps = [(x["step"], x["action"]) for x in lines(Finished(1, tmp_path), "faults.jsonl")]
    assert steps == [(1, "rollback"), (2, "rollback"), (3, "stop")]


def test_a_run_is_watched_and_profiled_when_asked(
    run_sft: Runner, tiny_sft: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 6 hangs until the watchdog has seen that nothing comes after step 4, the last one whose
    metrics were read; during step 2 a signal asks for a profile."""
    make, seen, traced = setup.train_step_fn, threading.Event(), []

    def hangs(*args: Any) -> Step:
        step = make(*args)

        def train_step(state: TrainState, *others: Any) -> tuple[TrainState, Any]:
            number = int(state.step) + 1
            if number == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            if number == 6:
                assert seen.wait(60)
            traced.append(number)
            return step(state, *others)

        return train_step

    def end(_: Watchdog, limit: float, what: str) -> None:
        if what == "after step 4":
            seen.set()

    monkeypatch.setattr(setup, "train_step_fn", hangs)
    monkeypatch.setattr(Watchdog, "_end", end)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: traced.append("on"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traced.append("off"))
    run_sft(*tiny_sft, *KEYS, "faults.watchdog=0.2", "log.profile_steps=2", devices=2)
    assert traced == [1, 2, "on", 3, 4, "off", 5, 6, 7, 8, 9]


def test_learning_online_refuses_to_leave_batches_out() -> None:
    task = ["model.path=x", "task.type=countdown", "faults.on_spike=rollback"]
    with pytest.raises(config.ConfigError, match="sampled by the policy that went wrong"):
        config.load(rl.Config, [], task)


def test_the_answers_to_faults_may_change_between_starts() -> None:
    given = ["model.path=x", "data.sources.a.path=x", "batch.rows=1", "data.seq_len=8"]
    one, other = (config.load(sft.Config, [], [*given, *k]) for k in ([], [ROLLBACK]))
    assert config.diff(one, other) == {"faults.on_nonfinite": ("stop", "rollback")}
