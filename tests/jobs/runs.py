"""What tests know of a run of `posttrain sft`: the golden settings, and the files it leaves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

GOLDEN = [
    "model.dtype=float32",
    "model.remat=none",
    "data.seq_len=512",
    "data.too_long=error",
    "batch.packing=none",
    "batch.order=sequential",
    "batch.examples=8",
    "optim.lr=1e-3",
    "optim.schedule=constant",
    "optim.warmup=0",
    "log.tensorboard=false",
]
"""The settings of the golden runs (float32, AdamW, no decay), but for their length."""


@dataclass(frozen=True)
class Finished:
    """What a run left behind."""

    code: int
    folder: Path

    @property
    def metrics(self) -> list[dict]:
        """The training lines of metrics.jsonl."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if "loss" in line]

    @property
    def losses(self) -> np.ndarray:
        return np.array([line["loss"] for line in self.metrics])

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """The exported tensors."""
        return load_file(self.folder / "export" / "model.safetensors")


Runner = Callable[..., Finished]


Runner = Callable[..., Finished]
"""run_sft(*key=value, devices=8, folder=a new one)."""


def start(keys: list[str], devices: int) -> subprocess.Popen[str]:
    """`posttrain sft key=value ...` in a process of its own with so many fake devices."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "posttrain.cli", "sft", *keys]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=env, text=True, **pipes)


def start_together(keys: list[str], processes: int, devices: int) -> list[subprocess.Popen[str]]:
    """One run on several processes over loopback, with `devices` fake devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = [f"distributed.coordinator=127.0.0.1:{port}", f"distributed.processes={processes}"]
    return [start([*keys, *meet, f"distributed.process_id={i}"], devices) for i in range(processes)]


def finish(running: list[subprocess.Popen[str]], seconds: float = 300) -> list[int]:
    """Waits for all, prints what they said; exit codes. Kills all if one takes too long."""
    try:
        said = [process.communicate(timeout=seconds)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for i, text in enumerate(said):
        print(f"--- process {i}, exit code {running[i].returncode}\n{text}")
    return [process.returncode for process in running]
