"""The training loop: steps, evaluation, checkpoints, going back, and leaving in good order.

The host runs one step ahead of the devices: it reads the metrics of step k after it has dispatched
step k + 1, and waits for the devices at no other place than checkpoints and evaluations. What
becomes of faults is in docs/faults.md.
"""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax

from posttrain.metrics import Progress
from posttrain.train.goodput import Goodput
from posttrain.train.profiler import Profiler
from posttrain.train.reporter import Reporter, evaluation_line
from posttrain.train.run import Run, Step
from posttrain.train.source import Stopped
from posttrain.train.spikes import Diverged, FaultLog, Watch, passed_over
from posttrain.train.state import abstract
from posttrain.train.watchdog import Watchdog

PREEMPTED = 75
"""Exit code of a run that was told to stop and saved: start it again and it goes on."""


@contextmanager
def stops_at_once() -> Iterator[None]:
    """SIGTERM inside, where nothing waits to be saved, is SystemExit(PREEMPTED) and no more;
    SIGUSR1, which asks for a profile, is passed over, where by itself it would end the process.

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
    profiles = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        signal.signal(signal.SIGUSR1, profiles)


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


def train(run: Run, state: Any) -> tuple[Any, bool]:
    """Runs from state.step to run.total_steps; (final state, whether it was preempted).

    Raises FloatingPointError at a loss or gradient norm that is not finite, or far above those
    before it, unless run.faults says to go back; such a state is never saved, the last checkpoint
    stands. OSError where nothing can be saved. A run that hangs is ended (train/watchdog.py).
    """
    with _Loop(run, state) as loop:
        return loop.go()


class _Loop(ExitStack):
    def __init__(self, run: Run, state: Any):
        super().__init__()
        self._run, self._state = run, state
        process, start = jax.process_index(), int(state.step)
        notes = run.checkpoints.notes(start) if start else {}
        self._progress = Progress(
            "train", run.total_steps, start, every=run.log.every, primary=process == 0
        )
        self.callback(self._progress.close)
        self._faults, self._watch = FaultLog(run.folder), Watch(run.faults, notes)
        self._reporter = Reporter(run, self._progress, notes.get("tokens", run.tokens_before))
        self._goodput = Goodput(run.folder, began=run.began, step=start, primary=process == 0)
        self.callback(self._goodput.write)
        limits = run.faults.watchdog, run.faults.watchdog_slow
        self._watchdog = Watchdog(run.folder, *limits, process=process)
        self.callback(self._watchdog.close)
        self._preemption = Preemption()
        self.callback(self._preemption.close)
        self._profiler = Profiler(run.folder, run.log, self._progress.say, poll=process == 0)
        self.callback(self._profiler.close)
        self._pending: deque[Step] = deque()
        self._compiled = self._stopped = False

    def go(self) -> tuple[Any, bool]:
        run, step = self._run, int(self._state.step)
        run.source.watch(self._told_to_stop)
        if skipped := sorted(self._faults.skipped):
            self._progress.say(f"left out, as faults.jsonl has it: the batches of steps {skipped}")
        if run.faults.goes_back and run.checkpoints.latest() is None:
            self._save(step)  # what the first steps would go back to
        self._goodput.turn("steps")
        while step < run.total_steps and not self._stopped:
            step += 1
            try:
                self._step(step)
            except Diverged as found:
                step = self._go_back(found)
        run.writer.write(int(self._state.step), self._goodput.metrics())
        self._progress.say(self._goodput.table())
        return self._state, self._stopped and int(self._state.step) < run.total_steps

    def _step(self, step: int) -> None:
        run, source = self._run, self._run.source
        self._profiler.before(step, self._state)
        waited = source.waited
        try:
            with self._watchdog.slow("making a batch"):
                batch = source.next(self._state)
        except Stopped:
            self._stopped = True
            if step > 1:
                self._save(step - 1, wait=True)
            self._progress.say(f"told to stop while sampling: step {step - 1} stands")
            return
        waited = source.waited - waited
        idle = all(_ready(before.metrics) for before in self._pending)
        if step in self._faults.skipped:
            self._drain()
            self._state = passed_over(self._state)
            run.writer.write(step, {"skipped": 1.0})
        else:
            with self._compiling(), jax.profiler.StepTraceAnnotation("train", step_num=step):
                self._state, metrics = run.train_step(self._state, batch, run.reference, run.frozen)
            told = source.told()
            self._pending.append(Step(step, metrics, told, waited))
            if told.apart is not None:
                self._goodput.move(waited, "sampling")
            elif idle:  # else the devices were at work meanwhile: it cost nothing
                self._goodput.move(waited, "data")
        self._drain(source.ahead)
        self._profiler.after(step, self._state)
        self._stopped = self._preemption.reached()
        last = step == run.total_steps
        if run.checkpoints.due(step) or last or self._stopped:
            self._save(step, wait=last or self._stopped)
        due = last or (run.eval_every is not None and step % run.eval_every == 0)
        if run.evaluate is not None and due and not self._stopped:
            self._evaluate(step)
        if self._stopped:
            self._progress.say(f"told to stop: saved step {step}")

    def _drain(self, ahead: int = 0) -> None:
        """Reads the metrics of all steps but the last `ahead`. Raises Diverged."""
        while len(self._pending) > ahead:
            step = self._pending.popleft()
            metrics = self._reporter.report(step)
            self._watchdog.step(step.number)
            self._goodput.beat()
            try:
                self._watch.look(step.number, metrics)
            except Diverged as found:
                found.examples = step.told.examples
                raise

    def _save(self, step: int, *, wait: bool = False) -> None:
        self._drain()  # a state is saved only after its loss was seen to be fit
        run = self._run
        self._goodput.mark(step)
        with self._apart("save"):
            notes = {"tokens": self._reporter.tokens, **self._watch.notes()}
            run.checkpoints.save(step, self._state, run.source.save(step), notes, wait=wait)
        run.writer.write(step, self._goodput.metrics())

    def _evaluate(self, step: int) -> None:
        run = self._run
        assert run.evaluate is not None
        self._drain()
        try:
            with self._apart("evaluation"):
                found = run.evaluate(self._state, step)
        except Stopped:
            self._stopped = True
            self._save(step, wait=True)
        else:
            run.writer.write(step, found)
            self._progress.say(evaluation_line(step, found))

    def _go_back(self, found: Diverged) -> int:
        """To the last checkpoint, whose step is returned, if the config and the count of times
        allow it; the step that diverged will be passed over. Else raises FloatingPointError."""
        run = self._run
        self._pending.clear()  # made after the step that diverged
        run.checkpoints.settle()
        back = run.checkpoints.latest()
        wanted = run.faults.on_spike if found.kind == "spike" else run.faults.on_nonfinite
        times = len(self._faults.skipped)
        if wanted != "rollback" or times >= run.faults.max_rollbacks or back is None:
            self._faults.write(found, "stop", back)
            raise FloatingPointError(_why(run, found, back, times if wanted == "rollback" else 0))
        assert run.seek is not None, "the config allows it where the source does"
        self._faults.write(found, "rollback", back)
        self._progress.say(
            f"{found}: back to checkpoint {back}, then on without the {len(found.examples)} "
            f"examples of step {found.step} (faults.jsonl; {times + 1} of at most "
            f"{run.faults.max_rollbacks} times)"
        )
        with self._apart("setup"):
            layout = abstract(self._state)
            for array in jax.tree.leaves(self._state):  # there is not room for two
                array.delete()
            self._state = run.checkpoints.restore(layout, back)
            run.seek(back)
            run.writer.rewind(back)
            notes = run.checkpoints.notes(back)
            self._watch = Watch(run.faults, notes)
            self._reporter.tokens = notes.get("tokens", 0)
        self._goodput.lose(back)
        return back

    def _told_to_stop(self) -> bool:
        self._watchdog.alive()
        return self._preemption.reached()

    @contextmanager
    def _apart(self, kind: str) -> Iterator[None]:
        """Inside, time is of another kind than steps, and no rate counts it."""
        with self._reporter.paused(), self._goodput.spent(kind), self._watchdog.slow(kind):
            yield

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Around the dispatch of a step: the first waits for the compiler."""
        if self._compiled:
            yield
            return
        with self._goodput.spent("compile"), self._watchdog.slow("compiling"):
            yield
        self._compiled = True


def _ready(metrics: Any) -> bool:
    """Whether the devices have made them; asks, and does not wait."""
    leaves: list[Any] = jax.tree.leaves(metrics)
    return all(leaf.is_ready() for leaf in leaves)


def _why(run: Run, found: Diverged, back: int | None, times: int) -> str:
    saved = "there is no checkpoint" if back is None else f"checkpoint {back} stands"
    look = f"data preview CONFIG.yaml preview.step={found.step - 1}"
    hints = ["Lower optim.lr, or look at the step's examples with `posttrain {look}`"]
    if run.seek is None:
        look = f"report rollouts {run.folder}"
    elif times:
        hints.append(
            f"The run has gone back {times} times (faults.max_rollbacks): what makes it may be in "
            "the checkpoint; without its folder the run goes on from the one before"
        )
    else:
        hints.append("faults.on_nonfinite and on_spike can leave such a step out (docs/faults.md)")
    text = ". ".join(hints).format(look=look)
    return f"{found}; nothing of it was saved, {saved}. {text}"
