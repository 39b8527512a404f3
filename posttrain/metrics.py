"""What a run says about itself: metrics.jsonl always, TensorBoard by default, a progress line.

Only process 0 writes. Numbers are averages over the optimiser step unless their name says more.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import field_validator

from posttrain.config import Config, runtime
from posttrain.types import Extremes, Mean, Routing

Metrics = dict[str, Any]
"""What a step reports, on device: name -> Mean, Extremes, Routing or scalar."""
SUPERSEDED = "metrics.superseded.jsonl"


class LogConfig(Config):
    """Where metrics go."""

    tensorboard: bool = runtime(True, help="write TensorBoard event files beside metrics.jsonl")
    every: int = runtime(1, gt=0, help="steps between lines of the terminal's log (not a terminal)")
    peak_tflops: float | None = runtime(
        None, gt=0, help="peak TFLOP/s of one device for MFU; none = known from the device's name"
    )
    trace_steps: tuple[int, int] | None = runtime(
        None, help="first and last step of a profiler trace (perfetto, xprof), written to trace/"
    )

    profile_steps: int = runtime(
        3, gt=0, help="steps that SIGUSR1, or a file <run_dir>/profile, has traced to trace/"
    )

    @field_validator("trace_steps")
    @classmethod
    def _a_range(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError("must be [first, last] with 1 <= first <= last")
        return steps


def flatten(metrics: Mapping[str, Any], source_names: list[str]) -> dict[str, float]:
    """Device metrics fetched to the host -> plain numbers; "loss_by_source" -> loss/<name>.

    What is of nothing (the Mean of a source with no token in this step) is left out: it has no
    value. Extremes of x are min_x and max_x; of a/x, a name within a group, a/x/min and a/x/max. Of
    labelled answers, rewards/margins is the difference of the two labels' means, as TRL has it.
    """
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if name == "loss_by_source":
            parts = zip(source_names, value.total, value.count, strict=True)
            flat |= {f"loss/{source}": float(t / n) for source, t, n in parts if n > 0}
        elif isinstance(value, Mean):
            if value.count > 0:
                flat[name] = float(value.value)
        elif isinstance(value, Routing):
            flat |= _router(value)
        elif isinstance(value, Extremes):
            if not value.low > value.high:
                ends = ("min", "max")
                low, high = (f"{name}/{x}" if "/" in name else f"{x}_{name}" for x in ends)
                flat |= {low: float(value.low), high: float(value.high)}
        else:
            flat[name] = float(value)
    if flat.keys() >= {"rewards/chosen", "rewards/rejected"}:
        flat.setdefault("rewards/margins", flat["rewards/chosen"] - flat["rewards/rejected"])
    return flat


def _router(routing: Routing) -> dict[str, float]:
    """What the routers of a mixture's layers did, arrays [L, ..] of sums over the real tokens.

    router/balance and router/z: their losses (models/moe.py), unweighted. router/entropy: of their
    distributions, in nats. All three are means over layers. router/max_load and router/min_load:
    among all experts of all layers, the most and the least tokens, where 1 is an even share.
    """
    tokens, experts = routing.tokens.clip(1), routing.probs.shape[-1]
    shares, probs = routing.chosen / tokens[:, None], routing.probs / tokens[:, None]
    load = shares * experts / shares.sum(-1, keepdims=True).clip(1)
    return {
        "router/balance": float((shares * probs).sum(-1).mean() * experts),
        "router/z": float((routing.z / tokens).mean()),
        "router/entropy": float((routing.entropy / tokens).mean()),
        "router/max_load": float(load.max()),
        "router/min_load": float(load.min()),
    }


class Writer:
    """Appends to <folder>/metrics.jsonl and to TensorBoard files. Does nothing unless primary."""

    def __init__(self, folder: Path, cfg: LogConfig, *, primary: bool, resumed_at: int = 0):
        """Lines of steps after `resumed_at` will be made again: they move to SUPERSEDED."""
        self._file = self._board = None
        self._folder, self._cfg = folder, cfg
        if primary:
            self._open(resumed_at)

    def _open(self, resumed_at: int) -> None:
        folder, cfg = self._folder, self._cfg
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _set_aside(path, resumed_at)
        self._file = path.open("a", encoding="utf-8")
        if cfg.tensorboard:
            self._board = _summary_writer()(
                str(folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; step counts the updates made, this one included."""
        if self._file is None:
            return
        line = {"step": step} | {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """As if the run went on at this step: later lines are set aside."""
        if self._file is not None:
            self.close()
            self._open(step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _summary_writer() -> Any:
    """tensorboardX's writer, without the torch that it imports wherever torch is installed.

    That would cost a run more time than the rest of its start, and 200 MiB, for nothing.
    """
    modules: dict[str, Any] = sys.modules
    hides = "torch" not in modules
    if hides:
        modules["torch"] = None  # an import of it is an ImportError, which tensorboardX expects
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hides:
            del modules["torch"]
    return SummaryWriter


def _set_aside(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    keep, rest = [], []
    for line in lines:
        try:
            # a run that begins anew makes the line of step 0 again, too
            known = bool(last_step) and json.loads(line)["step"] <= last_step
            (keep if known else rest).append(line)
        except (ValueError, KeyError):  # a line cut short when its process was killed
            rest.append(line)
    if not rest:
        return
    with path.with_name(SUPERSEDED).open("a", encoding="utf-8") as aside:
        aside.writelines(line + "\n" for line in rest)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in keep), encoding="utf-8")
    temporary.replace(path)


class Progress:
    """A bar with speed and time left on a terminal, plain lines elsewhere; primary process only."""

    def __init__(self, title: str, total: int, done: int, *, every: int, primary: bool):
        self._title, self._total, self._done = title, total, done
        self._every, self._primary = every, primary
        self._start, self._first = time.monotonic(), done
        self._bar = self._task = None
        if primary and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def update(self, done: int, note: str) -> None:
        self._done = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif self._primary and (done % self._every == 0 or done == self._total):
            elapsed = time.monotonic() - self._start
            left = elapsed / max(done - self._first, 1) * (self._total - done)
            print(
                f"{self._title} {done}/{self._total} {note} ({_clock(left)} left)",
                file=sys.stderr,
                flush=True,
            )

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._primary:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
