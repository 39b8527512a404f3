"""What tests know of a training run: the golden settings, and the files it leaves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

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

GOLDEN_PAIRS = [
    *(key for key in GOLDEN if key.split("=")[0] not in ("data.seq_len", "optim.lr")),
    "data.seq_len=768",  # both sides of a golden pair are up to 1,400 tokens
    "optim.lr=1e-4",
    "batch.examples=4",
]
"""Likewise of the golden DPO run."""


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
"""run_sft(*key=value, devices=8, folder=a new one); run_preference likewise."""


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """The largest relative difference."""
    return float(np.max(np.abs(got - want) / np.abs(want)))


def l2_apart(a: Finished, b: Finished) -> dict[str, float]:
    """Relative L2 distance of each exported tensor."""
    mine, other = a.weights, b.weights
    assert mine.keys() == other.keys()
    norm = np.linalg.norm
    return {k: float(norm(mine[k] - other[k]) / norm(other[k])) for k in mine}


def mesh_keys(data: int, fsdp: int, tensor: int) -> list[str]:
    """The config keys of a mesh."""
    return [f"mesh.data={data}", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}"]


def start(
    keys: list[str], devices: int, job: str = "sft", env: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[str]:
    """`posttrain <job> key=value ...` in a process of its own with so many fake devices."""
    own = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "posttrain.cli", job, *keys]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env={**os.environ, **own, **env}, text=True, **pipes)


def free_port() -> int:
    """Of the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_together(
    keys: list[str], processes: int, devices: int, job: str = "sft"
) -> list[subprocess.Popen[str]]:
    """One run on several processes over loopback, with `devices` fake devices each."""
    meet = [
        f"distributed.coordinator=127.0.0.1:{free_port()}",
        f"distributed.processes={processes}",
    ]
    return [
        start([*keys, *meet, f"distributed.process_id={i}"], devices, job) for i in range(processes)
    ]


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


def newest_step(folder: Path) -> int:
    """The steps that metrics.jsonl has whole lines of."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return sum('"loss": ' in line and line.endswith("\n") for line in lines)


def wait_until(reached: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    """Looks again and again (or until the process has ended)."""
    until = time.monotonic() + 200
    while time.monotonic() < until and running.poll() is None and not reached():
        time.sleep(0.02)


def wait_for_step(folder: Path, step: int, running: subprocess.Popen[str]) -> None:
    """Until metrics.jsonl has the step's line (or the process has ended)."""
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), running)
