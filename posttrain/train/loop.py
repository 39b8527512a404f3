"""The training loop: steps, what they report, evaluation, checkpoints, and leaving in good order.

The host runs one step ahead of the devices: it reads the metrics of step k after it has dispatched
step k + 1, and waits for the devices at no other place than checkpoints and evaluations.
"""

from __future__ import annotations

import itertools
import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import psutil

from posttrain import metrics as reporting
from posttrain.checkpoint import Checkpoints
from posttrain.metrics import LogConfig, Progress, Writer
from posttrain.models.spec import Spec
from posttrain.train.source import BatchSource, Stopped, Told
from posttrain.train.throughput import PEAK_TFLOPS, train_flops

WATCHED = ("rewards/accuracies", "rewards/margins", "accuracy", "margin")
"""Metrics that the terminal shows beside the loss, where there are any."""
WATCHED_ONLINE = ("reward", "entropy", "kl", "accuracy")
"""Likewise of steps on sampled answers."""
PREEMPTED = 75
"""Exit code of a run that was told to stop and saved: start it again and it goes on."""


@contextmanager
def stops_at_once() -> Iterator[None]:
    """SIGTERM inside, where nothing waits to be saved, is SystemExit(PREEMPTED) and no more.

    For the time before the first step and after the last: in between, Preemption takes over. With
    several processes jax's notifier holds the signal as soon as they have met.
    """

    def leave(*_: object) -> None:
        print("told to stop: nothing is lost, start again", file=sys.stderr, flush=True)
        raise SystemExit(PREEMPTED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class Preemption:
    """Whether the run was told to stop (SIGTERM), the same answer on every process of a run."""

    _calls = itertools.count(1)  # the sync point is a number of calls: they go on for all of a run

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._shared = jax.process_count() > 1
        self._previous: Any = None
        self._installed = False
        # with several processes jax's own notifier holds the signal, and agrees on a step
        if not self._shared and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._flag.set())
            self._installed = True

    def reached(self) -> bool:
        """Called after every step on every process."""
        if self._shared:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(next(self._calls))
        return self._flag.is_set()

    def close(self) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)


@dataclass(frozen=True)
class Run:
    """All that the loop needs; the job puts it together."""

    folder: Path
    spec: Spec
    train_step: Callable[..., tuple[Any, reporting.Metrics]]
    """(state, batch, reference, frozen) -> (state, metrics); a state has a `step`."""
    reference: Any
    """The parameters of a live reference; None: there is none."""
    synced: bool
    """Whether there is one in the state instead."""
    frozen: Any
    """The parameters that are not trained."""
    adapters: bool
    """Whether the model is among these, and adapters are trained."""
    source: BatchSource
    total_steps: int
    source_names: list[str]
    checkpoints: Checkpoints
    writer: Writer
    log: LogConfig
    evaluate: Callable[[Any, int], dict[str, float]] | None
    """(state, step) -> metrics; called every eval_every steps and at the end."""
    eval_every: int | None
    tokens_before: int
    """Non-padding tokens of the steps that an earlier start of the run made."""


@dataclass
class _Step:
    """A dispatched step whose metrics were not read yet."""

    number: int
    metrics: reporting.Metrics
    told: Told
    waited: float


def train(run: Run, state: Any) -> tuple[Any, bool]:
    """Runs from state.step to run.total_steps; (final state, whether it was preempted).

    Raises FloatingPointError at the first loss or gradient that is not finite: such a state is
    never saved, the last checkpoint stands.
    """
    primary = jax.process_index() == 0
    start = int(state.step)
    progress = Progress("train", run.total_steps, start, every=run.log.every, primary=primary)
    preemption = Preemption()
    reporter = _Reporter(run, progress)
    pending: deque[_Step] = deque()
    stopped = False
    trace = _Trace(run)
    run.source.watch(preemption.reached)

    def save(step: int, *, wait: bool = False) -> None:
        while pending:  # a state is saved only after its loss was seen to be finite
            reporter.report(pending.popleft())
        with reporter.paused():
            run.checkpoints.save(step, state, run.source.save(step), wait=wait)

    try:
        for step in range(start + 1, run.total_steps + 1):
            trace.before(step, state)
            waited = run.source.waited
            try:
                batch = run.source.next(state)
            except Stopped:
                stopped = True
                if step > 1:
                    save(step - 1, wait=True)
                progress.say(f"told to stop while sampling: step {step - 1} stands")
                break
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, device_metrics = run.train_step(state, batch, run.reference, run.frozen)
            waited = run.source.waited - waited
            pending.append(_Step(step, device_metrics, run.source.told(), waited))
            while len(pending) > run.source.ahead:
                reporter.report(pending.popleft())
            trace.after(step, device_metrics)
            stopped = preemption.reached()
            last = step == run.total_steps
            evaluates = run.evaluate is not None and (
                last or (run.eval_every is not None and step % run.eval_every == 0)
            )
            if run.checkpoints.due(step) or last or stopped:
                save(step, wait=last or stopped)
            if evaluates and run.evaluate is not None and not stopped:
                while pending:
                    reporter.report(pending.popleft())
                try:
                    with reporter.paused():
                        found = run.evaluate(state, step)
                except Stopped:
                    stopped = True
                    save(step, wait=True)
                else:
                    run.writer.write(step, found)
                    progress.say(evaluation_line(step, found))
            if stopped:
                progress.say(f"told to stop: saved step {step}")
                break
    finally:
        trace.close()
        preemption.close()
        progress.close()
    return state, stopped and int(state.step) < run.total_steps


class _Reporter:
    """Fetches a step's metrics, adds what the host knows, writes them down."""

    def __init__(self, run: Run, progress: Progress):
        self._run, self._progress = run, progress
        self._tokens = run.tokens_before
        self._clock = time.monotonic()
        self._steps = 0
        device = jax.local_devices()[0]
        peak = run.log.peak_tflops or PEAK_TFLOPS.get(device.device_kind)
        self._peak = peak * 1e12 * jax.device_count() if peak else None
        self._device = device
        self._process = psutil.Process()

    def paused(self) -> _Pause:
        """Time inside does not count as training time."""
        return _Pause(self)

    def skip(self, seconds: float) -> None:
        self._clock += seconds

    def report(self, step: _Step) -> None:
        run, told, size = self._run, step.told, step.told.size
        flat = reporting.flatten(jax.device_get(step.metrics), run.source_names)
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self._tokens += size.tokens
        flat |= {
            "epoch": told.epochs,
            "num_tokens": self._tokens,
            "examples": size.examples,
            "packing_efficiency": size.tokens / size.positions,
            "seconds": seconds,
            "data_wait_seconds": step.waited,
            **self._memory(),
            **told.metrics,
        }
        watched = WATCHED
        if told.apart is not None:  # rates are of the training alone
            watched, seconds = WATCHED_ONLINE, max(seconds - told.apart, 1e-9)
            flat["time/training"] = seconds
        if self._steps:  # the first step's time is mostly compilation: it gives no rate
            live = run.reference is not None or run.synced
            flops = (
                train_flops(run.spec, size, live_reference=live, adapters=run.adapters) / seconds
            )
            flat |= {
                "examples_per_second": size.examples / seconds,
                "tokens_per_second": size.tokens / seconds,
                "trained_tokens_per_second": size.trained / seconds,
                "tflops_per_second": flops / 1e12,
            }
            if self._peak:
                flat["mfu"] = flops / self._peak
        self._steps += 1
        run.writer.write(step.number, flat)
        shown = [f"loss {flat.get('loss', math.nan):.4f}"]
        shown += [f"{name} {flat[name]:.3f}" for name in watched if name in flat]
        shown += [f"lr {flat['learning_rate']:.2e}"]
        if "tokens_per_second" in flat:
            shown += [f"{flat['tokens_per_second']:,.0f} tok/s"]
        self._progress.update(step.number, " ".join(shown))
        for name in ("loss", "grad_norm"):
            if not math.isfinite(flat.get(name, math.nan)):
                last = run.checkpoints.latest()
                saved = "there is no checkpoint" if last is None else f"checkpoint {last} stands"
                look = f"data preview CONFIG.yaml preview.step={step.number - 1}"
                if told.apart is not None:
                    look = f"report rollouts {run.folder}"
                raise FloatingPointError(
                    f"step {step.number}: {name} is {flat.get(name)}; nothing of it was saved, "
                    f"{saved}. Lower optim.lr, or look at the step's examples with `posttrain "
                    f"{look}`"
                )

    def _memory(self) -> dict[str, float]:
        stats = self._device.memory_stats() or {}
        memory = {"memory/host_gib": self._process.memory_info().rss / 2**30}
        if "peak_bytes_in_use" in stats:
            memory["memory/device_peak_gib"] = stats["peak_bytes_in_use"] / 2**30
        return memory


class _Pause:
    def __init__(self, reporter: _Reporter):
        self._reporter = reporter

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._reporter.skip(time.monotonic() - self._began)


class _Trace:
    """The profiler, on for those of log.trace_steps that this start of the run makes."""

    def __init__(self, run: Run):
        self._folder, self._steps = run.folder / "trace", run.log.trace_steps
        self._on = self._made = False

    def before(self, step: int, wait_for: Any) -> None:
        """wait_for: the state that step begins with, so that no earlier step is in the trace."""
        if self._steps and not self._made and self._steps[0] <= step <= self._steps[1]:
            jax.block_until_ready(wait_for)
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._on = self._made = True

    def after(self, step: int, wait_for: Any) -> None:
        if self._steps and step == self._steps[1]:
            jax.block_until_ready(wait_for)
            self.close()

    def close(self) -> None:
        """Writes what was traced, also of a run that ends before the last of its steps."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


def evaluation_line(step: int, metrics: dict[str, float]) -> str:
    """What the terminal says of an evaluation."""
    ends = tuple(f"/{name}" for name in ("loss", *WATCHED, "reward"))
    shown = [f"{k} {v:.4f}" for k, v in metrics.items() if k.endswith(ends)]
    return f"evaluation at step {step}: " + ", ".join(shown)
