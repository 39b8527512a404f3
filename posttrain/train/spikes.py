"""Losses that are no numbers, or far above those before them, and what becomes of their batches.

A spike is a loss, or a norm of the gradient before clipping, with

    x > median + deviations * max(1.4826 * MAD, 0.01 * |median|)

over the last `window` steps. MAD is the median of the distances from the median; times 1.4826 it is
the standard deviation, were they normal (Iglewicz and Hoaglin 1993; Leys et al. 2013). Unlike mean
and deviation neither is moved by the few values that it is to find. Nothing is a spike before the
window is full. To go back and leave the batch out is what PaLM's runs did (Chowdhery et al. 2022,
arXiv:2204.02311, section 5.1).

Every process decides by the same numbers: metrics are of the whole step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from posttrain.checkpoint import is_primary
from posttrain.train.answers import shared
from posttrain.train.config import FaultsConfig
from posttrain.train.state import TrainState

FILE = "faults.jsonl"
WATCHED = ("loss", "grad_norm")


class Diverged(FloatingPointError):
    """A step's loss or gradient is not what training goes on from.

    kind: "nonfinite" or "spike"; why: what was found; values: of WATCHED; examples: their ids.
    """

    def __init__(self, step: int, kind: str, why: str, values: Mapping[str, float]):
        super().__init__(f"step {step}: {why}")
        self.step, self.kind, self.why, self.values = step, kind, why, dict(values)
        self.examples: Sequence[int] = ()


class Watch:
    """Looks at each step's metrics in turn. notes: what notes() said at a checkpoint."""

    def __init__(self, cfg: FaultsConfig, notes: Mapping[str, Any]):
        self._cfg = cfg
        self._before: dict[str, deque[float]] = {
            name: deque(notes.get(name, ()), maxlen=cfg.spike_window) for name in WATCHED
        }

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises Diverged; else the step is one of those that the next are measured by."""
        values = {name: metrics.get(name, math.nan) for name in WATCHED}
        for name, value in values.items():
            if not math.isfinite(value):
                raise Diverged(step, "nonfinite", f"{name} is {value}", values)
        if self._cfg.on_spike == "ignore":
            return
        for name, value in values.items():
            usual = self._before[name]
            if len(usual) == self._cfg.spike_window:
                middle, spread = usual_of(usual)
                if value > middle + self._cfg.spike_deviations * spread:
                    why = (
                        f"{name} is {value:.4g}, {(value - middle) / spread:.1f} deviations of "
                        f"{spread:.4g} above {middle:.4g}, the median of {len(usual)} steps"
                    )
                    raise Diverged(step, "spike", why, values)
        for name, value in values.items():
            self._before[name].append(value)

    def notes(self) -> dict[str, list[float]]:
        """What a checkpoint has to hold, so that a resumed run finds the same spikes."""
        return {name: list(values) for name, values in self._before.items() if values}


def usual_of(values: Sequence[float] | deque[float]) -> tuple[float, float]:
    """(median, spread) as the formula above has them."""
    array = np.asarray(values, np.float64)
    middle = float(np.median(array))
    mad = float(np.median(np.abs(array - middle)))
    return middle, max(1.4826 * mad, 0.01 * abs(middle), 1e-12)


class FaultLog:
    """<run_dir>/faults.jsonl: a line for each step that diverged, with what was done.

    It is written before a run goes back, and read at each start: what was left out stays so.
    """

    def __init__(self, folder: Path):
        self._file = folder / FILE
        text = shared(lambda: self._file.read_bytes() if self._file.exists() else b"").decode()
        self._lines = [json.loads(line) for line in text.splitlines()]

    @property
    def skipped(self) -> set[int]:
        """The steps whose batches are left out."""
        return {line["step"] for line in self._lines if line["action"] == "rollback"}

    def write(self, found: Diverged, action: str, back: int | None) -> None:
        """action: "stop" or "rollback" (to step `back`)."""
        line = {
            "step": found.step,
            "fault": found.kind,
            "why": found.why,
            **{k: v if math.isfinite(v) else str(v) for k, v in found.values.items()},
            "action": action,
            "checkpoint": back,
            "examples": [int(i) for i in found.examples],
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self._lines.append(line)
        if is_primary():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(x) + "\n" for x in self._lines), "utf-8")
            temporary.replace(self._file)


def passed_over(state: TrainState) -> TrainState:
    """The state one step on, with no update made: parameters and moments stay.

    The learning rate's schedule counts the step, so that later steps have the rates they would
    have had.
    """

    def counted(part: Any) -> Any:
        if isinstance(part, optax.ScaleByScheduleState):
            return part._replace(count=part.count + 1)
        return part

    def move(state: TrainState) -> TrainState:
        is_part = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
        opt_state = jax.tree.map(counted, state.opt_state, is_leaf=is_part)
        return dataclasses.replace(state, step=state.step + 1, opt_state=opt_state)

    layout = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(move, donate_argnums=0, out_shardings=layout)(state)
