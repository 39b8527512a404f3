"""A preference run on several processes, and runs that are stopped in the pass and in training."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from posttrain.train.loop import PREEMPTED
from tests.jobs.runs import (
    Finished,
    Runner,
    finish,
    relative,
    start,
    start_together,
    wait_for_step,
    wait_until,
)

LENGTH = ["train.steps=8", "checkpoint.every=3"]


@pytest.fixture(scope="module")
def undisturbed(
    golden_pairs: list[str], tiny_pairs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """In a process of its own: how many threads share a sum depends on a process's devices."""
    folder = tmp_path_factory.mktemp("undisturbed")
    paths = [f"run_dir={folder}", f"data.cache_dir={folder}.cache"]
    keys = [*golden_pairs, *tiny_pairs, *LENGTH, *paths]
    assert finish([start(keys, devices=1, job="preference")]) == [0]
    return Finished(0, folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def keys(folder: Path, golden_pairs: list[str], tiny_pairs: list[str]) -> list[str]:
    paths = [f"run_dir={folder}", f"data.cache_dir={folder}.cache"]
    return [*golden_pairs, *tiny_pairs, *LENGTH, *paths]


def parts(folder: Path) -> list[Path]:
    """What passes have written down."""
    return list(Path(f"{folder}.cache").glob("reference/*/*.part.npy"))


def test_two_processes_make_the_same_run_and_one_goes_on_with_it(
    keys: list[str], folder: Path, undisturbed: Finished, run_preference: Runner,
    tiny_pairs: list[str],
) -> None:  # fmt: skip
    """Pairs whose sides lie on different processes too: loss within 1e-5, parameters 1e-5."""
    keys = [*keys, "train.steps=4", "mesh.data=2", "mesh.fsdp=2"]
    running = start_together(keys, processes=2, devices=2, job="preference")
    assert finish(running) == [0, 0]
    both = Finished(0, folder)
    assert relative(both.losses, undisturbed.losses[:4]) < 1e-5
    assert parts(folder)
    resumed = run_preference(*tiny_pairs, *LENGTH, devices=1, folder=folder)
    assert [line["step"] for line in resumed.metrics] == list(range(1, 9))
    assert relative(resumed.losses, undisturbed.losses) < 1e-5
    for name, want in undisturbed.weights.items():
        apart = np.linalg.norm(resumed.weights[name] - want) / np.linalg.norm(want)
        assert apart < 1e-5, (name, apart)


def test_sigterm_in_the_pass_writes_what_it_has_and_the_next_start_makes_the_rest(
    keys: list[str], folder: Path, undisturbed: Finished
) -> None:
    """Then SIGKILL in training: the end is the undisturbed run's, to the bit."""
    running = start(keys, devices=1, job="preference")
    began = Path(f"{folder}.cache")
    wait_until(lambda: any(began.glob("reference/*/*.pass.npy")), running)
    running.send_signal(signal.SIGTERM)
    assert finish([running]) == [PREEMPTED]
    assert not (folder / "checkpoints").exists()
    running = start(keys, devices=1, job="preference")
    wait_for_step(folder, 4, running)
    running.kill()
    finish([running])
    assert finish([start(keys, devices=1, job="preference")]) == [0]
    run = Finished(0, folder)
    assert [line["step"] for line in run.metrics] == list(range(1, 9))
    np.testing.assert_array_equal(run.losses, undisturbed.losses)
    for name, want in undisturbed.weights.items():
        np.testing.assert_array_equal(run.weights[name], want, err_msg=name)


def test_sigterm_in_the_pass_of_one_process_stops_both(keys: list[str], folder: Path) -> None:
    keys = [*keys, "train.steps=20", "mesh.data=2", "mesh.fsdp=1"]
    running = start_together(keys, processes=2, devices=1, job="preference")
    began = Path(f"{folder}.cache")
    wait_until(lambda: any(began.glob("reference/*/*.pass.npy")), running[0])
    running[1].send_signal(signal.SIGTERM)
    assert finish(running) == [PREEMPTED, PREEMPTED]
    assert not (folder / "metrics.jsonl").exists(), "it had begun to train"
