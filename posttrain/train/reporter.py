"""What each step reports: its metrics, and what the host knows of it, written down and shown."""

from __future__ import annotations

import math
import time

import jax
import psutil

from posttrain import metrics as reporting
from posttrain.metrics import Progress
from posttrain.train.run import Run, Step
from posttrain.train.throughput import PEAK_TFLOPS, train_flops

WATCHED = ("rewards/accuracies", "rewards/margins", "accuracy", "margin")
"""Metrics that the terminal shows beside the loss, where there are any."""
WATCHED_ONLINE = ("reward", "entropy", "kl", "accuracy")
"""Likewise of steps on sampled answers."""


class Reporter:
    """Fetches a step's metrics, adds what the host knows, writes them down."""

    def __init__(self, run: Run, progress: Progress, tokens: int):
        """tokens: non-padding ones of the steps before."""
        self._run, self._progress = run, progress
        self.tokens = tokens
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

    def report(self, step: Step) -> dict[str, float]:
        """Waits for the step; its metrics, as they were written."""
        run, told, size = self._run, step.told, step.told.size
        flat = reporting.flatten(jax.device_get(step.metrics), run.source_names)
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self.tokens += size.tokens
        flat |= {
            "epoch": told.epochs,
            "num_tokens": self.tokens,
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
        return flat

    def _memory(self) -> dict[str, float]:
        stats = self._device.memory_stats() or {}
        memory = {"memory/host_gib": self._process.memory_info().rss / 2**30}
        if "peak_bytes_in_use" in stats:
            memory["memory/device_peak_gib"] = stats["peak_bytes_in_use"] / 2**30
        return memory


class _Pause:
    def __init__(self, reporter: Reporter):
        self._reporter = reporter

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._reporter.skip(time.monotonic() - self._began)


def evaluation_line(step: int, metrics: dict[str, float]) -> str:
    """What the terminal says of an evaluation."""
    ends = tuple(f"/{name}" for name in ("loss", *WATCHED, "reward"))
    shown = [f"{k} {v:.4f}" for k, v in metrics.items() if k.endswith(ends)]
    return f"evaluation at step {step}: " + ", ".join(shown)
