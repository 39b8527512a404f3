"""A run killed again and again, at random moments and while it saves, ends as if undisturbed."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from tests.jobs.runs import Finished, finish, start

pytestmark = pytest.mark.soak

STEPS_A_ROUND = 30


def newest_step(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*tmp*"))


def kill_once(keys: list[str], folder: Path, rng: random.Random, while_saving: bool) -> bool:
    """Starts the run, lets it make some steps, kills it; False if it ended before."""
    running = start(keys, devices=1)
    began, patience = newest_step(folder), time.monotonic() + 200
    while running.poll() is None and time.monotonic() < patience:
        if newest_step(folder) > began:
            break
        time.sleep(0.01)
    wait_until = time.monotonic() + rng.uniform(0, 1.5)
    while running.poll() is None and time.monotonic() < wait_until:
        time.sleep(0.005)
    if while_saving:
        patience = time.monotonic() + 30
        while running.poll() is None and time.monotonic() < patience and not saving(folder):
            pass
        time.sleep(rng.uniform(0, 0.05))
    killed = running.poll() is None
    running.kill()
    finish([running])
    return killed


def test_a_run_killed_at_random_moments_equals_the_undisturbed_run_to_the_bit(
    golden_keys: list[str], tmp_path: Path, soak_rounds: int
) -> None:
    steps = STEPS_A_ROUND * (soak_rounds + 1)
    keys = [*golden_keys, f"train.steps={steps}", "batch.examples=2", "checkpoint.every=4"]
    calm, hurt = Finished(0, tmp_path / "calm"), Finished(0, tmp_path / "hurt")
    assert finish([start([*keys, f"run_dir={calm.folder}"], devices=1)], 1200) == [0]
    rng, kills = random.Random(0), 0
    hurt_keys = [*keys, f"run_dir={hurt.folder}"]
    for k in range(soak_rounds):
        kills += kill_once(hurt_keys, hurt.folder, rng, while_saving=k % 2 == 1)
        print(f"round {k + 1}: at step {newest_step(hurt.folder)} of {steps}")
    assert kills == soak_rounds, "the run ended before it was killed often enough"
    assert finish([start(hurt_keys, devices=1)], 1200) == [0]
    assert [line["step"] for line in hurt.metrics] == list(range(1, steps + 1))
    np.testing.assert_array_equal(hurt.losses, calm.losses)
    for name, want in calm.weights.items():
        np.testing.assert_array_equal(hurt.weights[name], want, err_msg=name)
