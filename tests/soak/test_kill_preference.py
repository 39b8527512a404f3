"""A preference run killed in the reference's pass and in training ends as if undisturbed."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.jobs.runs import Finished, finish, newest_step, start, wait_until

pytestmark = pytest.mark.soak

STEPS_A_ROUND = 15


def store(folder: Path, kind: str) -> list[Path]:
    """The files of its reference: "part" (log-probs), "pass" (there while one is not finished)."""
    return list(Path(f"{folder}.cache").glob(f"reference/*/*.{kind}.npy"))


def kill_once(running: subprocess.Popen[str], folder: Path, rng: random.Random, early: bool) -> int:
    """Kills it in training; where `early`, in the pass if a part comes first. The parts there."""
    had, began = len(store(folder, "part")), newest_step(folder)
    wait_until(
        lambda: newest_step(folder) > began or (early and len(store(folder, "part")) > had), running
    )
    time.sleep(rng.uniform(0, 0.4 if newest_step(folder) == began else 1.5))
    assert running.poll() is None, "the run ended before it was killed often enough"
    running.kill()
    finish([running])
    return len(store(folder, "part"))


def test_kills_in_the_pass_and_in_training_change_no_bit(
    golden_pairs: list[str],
    tiny_pairs: list[str],
    data_dir: Path,
    tmp_path: Path,
    soak_rounds: int,
) -> None:
    """As many kills in training as rounds, and before them up to as many in the pass."""
    steps = STEPS_A_ROUND * (soak_rounds + 1)
    pairs = data_dir / "data" / "hh_rlhf" / "harmless_base_test_part_train.jsonl"
    keys = [*golden_pairs, *tiny_pairs, f"data.sources.prefs.path={pairs}", "batch.examples=8"]
    keys += ["data.sources.prefs.limit=600", "data.on_bad_row=skip", "checkpoint.every=4"]
    calm, hurt = Finished(0, tmp_path / "calm"), Finished(0, tmp_path / "hurt")

    def begin(run: Finished) -> subprocess.Popen[str]:
        own = [f"run_dir={run.folder}", f"data.cache_dir={run.folder}.cache"]
        return start([*keys, f"train.steps={steps}", *own], devices=1, job="preference")

    assert finish([begin(calm)], 1200) == [0]
    rng, in_pass, in_training = random.Random(0), 0, 0
    while in_training < soak_rounds:
        early = in_pass < soak_rounds and newest_step(hurt.folder) == 0
        parts = kill_once(begin(hurt), hurt.folder, rng, early)
        in_pass += bool(store(hurt.folder, "pass"))
        in_training += newest_step(hurt.folder) > 0
        where = newest_step(hurt.folder)
        print(f"killed with {parts} parts written, at step {where} of {steps}")
    assert in_pass >= 1, "the pass was over before it was killed"
    assert finish([begin(hurt)], 1200) == [0]
    assert not store(hurt.folder, "pass")
    assert [line["step"] for line in hurt.metrics] == list(range(1, steps + 1))
    np.testing.assert_array_equal(hurt.losses, calm.losses)
    for name, want in calm.weights.items():
        np.testing.assert_array_equal(hurt.weights[name], want, err_msg=name)
