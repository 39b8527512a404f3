"""A run that learns online, killed while it samples and while it trains, ends as if undisturbed."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.jobs.rl_task import HERE
from tests.jobs.runs import Finished, finish, newest_step, start, wait_until

pytestmark = pytest.mark.soak

UPDATES = 8  # of a round of answers
STEPS_A_ROUND = 2 * UPDATES


def newest_round(folder: Path) -> int:
    """The last round that was sampled and written down; -1: none."""
    found = [int(p.stem) for p in (folder / "rounds").glob("*.npz") if p.stem.isdigit()]
    return max(found, default=-1)


def kill_once(running: subprocess.Popen[str], folder: Path, rng: random.Random, early: bool) -> str:
    """Kills it after some steps: `early` right behind the last step of a round, when the next one
    is sampled, else as soon as a round is written, in its steps. Says where that was."""
    began, rounds = newest_step(folder), newest_round(folder)
    wait_until(lambda: newest_step(folder) >= began + 3, running)
    if early:
        wait_until(lambda: newest_step(folder) % UPDATES == 0, running)
    else:
        wait_until(lambda: newest_round(folder) > rounds, running)
    time.sleep(rng.uniform(0, 0.05))
    assert running.poll() is None, "the run ended before it was killed often enough"
    running.kill()
    finish([running])
    done = newest_step(folder) == UPDATES * (newest_round(folder) + 1)
    return "sampling" if done else "training"


def test_kills_while_sampling_and_while_training_change_no_bit(
    tiny_model: Path, tmp_path: Path, soak_rounds: int
) -> None:
    steps = STEPS_A_ROUND * (soak_rounds + 1)
    keys = [
        *(f"model.path={tiny_model}", "model.dtype=float32", f"task.type={HERE}:Letters"),
        *("preset=ppo", "critic.optim.lr=1e-3", "optim.lr=1e-3", "sampling.max_new_tokens=24"),
        *("round.prompts=8", "round.answers=4", "round.steps=2", "round.passes=4"),
        *("round.seq_len=64", "round.micro_tokens=512", "round.slots=16", "round.resample=1"),
        *("eval.prompts=0", "log.tensorboard=false", "rollouts.every=1", "checkpoint.every=3"),
        f"train.steps={steps}",
    ]
    calm, hurt = Finished(0, tmp_path / "calm"), Finished(0, tmp_path / "hurt")

    def begin(run: Finished) -> subprocess.Popen[str]:
        return start([*keys, f"run_dir={run.folder}"], devices=1, job="rl")

    assert finish([begin(calm)], 1200) == [0]
    rng, places = random.Random(0), []
    for k in range(soak_rounds):
        places.append(kill_once(begin(hurt), hurt.folder, rng, early=k % 2 == 0))
        print(f"killed while {places[-1]}, at step {newest_step(hurt.folder)} of {steps}")
    assert {*places} == {"sampling", "training"}
    assert finish([begin(hurt)], 1200) == [0]
    assert [line["step"] for line in hurt.metrics] == list(range(1, steps + 1))
    for name in ("loss", "grad_norm", "critic/loss", "num_tokens", "epoch"):
        assert [x[name] for x in hurt.metrics] == [x[name] for x in calm.metrics], name
    for file in (calm.folder / "rollouts").iterdir():
        assert (hurt.folder / "rollouts" / file.name).read_text() == file.read_text(), file.name
    for name, want in calm.weights.items():
        np.testing.assert_array_equal(hurt.weights[name], want, err_msg=name)
