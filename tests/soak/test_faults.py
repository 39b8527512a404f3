"""Runs that are hurt at random, each time on another mesh and number of processes, lose nothing.

Kills of all while they save or at any moment, the death or the end of one, a disk that takes no
large file for a while: the batches and the losses are those of the run that nobody disturbed.
"""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.checkpoint import saved_steps
from posttrain.train.loop import PREEMPTED
from tests.jobs.runs import Finished, newest_step, relative, start, start_together, wait_until

pytestmark = pytest.mark.soak

STEPS_A_ROUND = 10
LAYOUTS = [  # processes, devices of each, mesh
    (2, 1, []),
    (1, 4, ["mesh.data=2"]),
    (2, 2, ["mesh.tensor=2"]),
    (1, 1, []),
    (4, 1, ["mesh.data=2"]),
    (1, 2, []),
    (2, 2, ["mesh.data=2"]),
]
Running = list[subprocess.Popen[str]]


def saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*tmp*"))


def begin(keys: list[str], layout: tuple[int, int, list[str]]) -> Running:
    processes, devices, mesh = layout
    if processes == 1:
        running = [start([*keys, *mesh], devices)]
    else:
        silent = "distributed.silent_seconds=10"
        running = start_together([*keys, *mesh, silent], processes, devices)
    for process in running:  # a full pipe would hold it up, and a failing save says much
        threading.Thread(target=drain, args=(process,), daemon=True).start()
    return running


def drain(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")


def wait(running: Running, seconds: float = 300) -> list[int]:
    """Exit codes; kills all if one takes too long."""
    try:
        return [process.wait(seconds) for process in running]
    finally:
        for process in running:
            process.kill()


def kill_all_while_saving(running: Running, folder: Path, rng: random.Random) -> None:
    wait_until(lambda: saving(folder), running[0])
    time.sleep(rng.uniform(0, 0.05))
    kill_all(running)


def kill_all(running: Running) -> None:
    for process in running:
        assert process.poll() is None, "the run ended before it was hurt often enough"
        process.kill()
    wait(running)


def tell_one_to_stop(running: Running, folder: Path, rng: random.Random) -> None:
    rng.choice(running).send_signal(signal.SIGTERM)
    assert wait(running) == [PREEMPTED] * len(running)
    assert saved_steps(folder)[-1] == newest_step(folder)


def let_writes_fail(running: Running, folder: Path, rng: random.Random) -> None:
    """Until the next save has failed; its second attempt or a later one succeeds."""
    for process in running:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
    time.sleep(rng.uniform(3, 5))
    for process in running:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
    before = saved_steps(folder)
    wait_until(lambda: saved_steps(folder) > before, running[0])
    kill_all(running)


def kill_all_at_any_moment(running: Running, folder: Path, rng: random.Random) -> None:
    time.sleep(rng.uniform(0, 0.5))
    kill_all(running)


def kill_one(running: Running, folder: Path, rng: random.Random) -> None:
    """The others end by themselves, with a code that is retried."""
    rng.choice(running).kill()
    assert not {0, 2, PREEMPTED} & {*wait(running)}


def kill_before_the_first_step(running: Running, folder: Path, rng: random.Random) -> None:
    """It may not have met the others yet."""
    kill_all(running)


Fault = Callable[[Running, Path, random.Random], None]
FAULTS: list[Fault] = [
    kill_all_while_saving,
    tell_one_to_stop,
    let_writes_fail,
    kill_all_at_any_moment,
    kill_one,
    kill_before_the_first_step,
]


def hurt(keys: list[str], folder: Path, fault: Fault, k: int, rng: random.Random) -> None:
    layout = LAYOUTS[k % len(LAYOUTS)]
    running, began = begin(keys, layout), newest_step(folder)
    if fault is kill_before_the_first_step:
        time.sleep(rng.uniform(0, 4))
    else:
        # lines of steps that are made again are first set aside: the number may fall
        wanted = (saved_steps(folder) or [0])[-1] + rng.randint(1, 4)
        changed = folder / "metrics.jsonl"
        was = changed.stat().st_mtime_ns if changed.exists() else 0
        wait_until(
            lambda: newest_step(folder) >= wanted and changed.stat().st_mtime_ns != was,
            running[0],
        )
    fault(running, folder, rng)
    print(f"round {k + 1}: {fault.__name__}, {layout}: step {began} -> {newest_step(folder)}")


def test_nothing_is_lost(
    golden_keys: list[str], tiny_sft: list[str], tmp_path: Path, soak_rounds: int
) -> None:
    steps = STEPS_A_ROUND * (soak_rounds + 1)
    keys = [*golden_keys, *tiny_sft, "batch.examples=8", "batch.order=shuffle", "optim.lr=1e-4"]
    keys += [f"train.steps={steps}", "train.epochs=null", "checkpoint.every=4"]
    calm, run = Finished(0, tmp_path / "calm"), Finished(0, tmp_path / "hurt")
    assert wait(begin([*keys, f"run_dir={calm.folder}"], (1, 1, []))) == [0]
    keys.append(f"run_dir={run.folder}")
    rng = random.Random(0)
    for k in range(soak_rounds):
        hurt(keys, run.folder, FAULTS[k % len(FAULTS)], k, rng)
    assert {*wait(begin(keys, LAYOUTS[soak_rounds % len(LAYOUTS)]), 1200)} == {0}
    assert [line["step"] for line in run.metrics] == list(range(1, steps + 1))
    for what in ("num_tokens", "examples", "epoch"):
        assert [x[what] for x in run.metrics] == [x[what] for x in calm.metrics], what
    apart = relative(run.losses, calm.losses)
    print(f"the largest relative difference of {steps} losses: {apart:.2g}")
    assert apart < 1e-5
