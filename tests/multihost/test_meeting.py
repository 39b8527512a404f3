"""Processes that do not go together: with another config, too few, one that stands still."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.runs import finish, free_port, start, start_together

STANDS = """
import sys, time
from posttrain.hosts import DistributedConfig, init_distributed
where, number = sys.argv[1:]
cfg = DistributedConfig(coordinator=where, processes=2, process_id=int(number), silent_seconds=5)
init_distributed(cfg)
print("joined", flush=True)
time.sleep(300)
"""


@pytest.fixture(scope="module")
def keys(golden_keys: list[str], tiny_sft: list[str]) -> list[str]:
    return [*golden_keys, *tiny_sft, "train.steps=2"]


def test_the_one_with_another_learning_rate_is_named_and_all_leave(
    keys: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They meet by what SLURM tells them."""
    port = str(free_port())
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "3"}
    running = []
    for number in "012":
        env = step | {"JAX_COORDINATOR_PORT": port, "SLURM_LOCALID": "0", "SLURM_PROCID": number}
        lr = ["optim.lr=0.5"] if number == "1" else []
        running.append(start([*keys, f"run_dir={tmp_path}", *lr], devices=1, env=env))
    assert finish(running, 150) == [2, 2, 2]
    said = capfd.readouterr().out
    assert said.count("optim.lr is 0.5, not 0.001") == 3
    assert said.count("process 1 on ") == 3
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_who_does_not_come_is_named(
    keys: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where = f"distributed.coordinator=127.0.0.1:{free_port()}"
    few = [where, "distributed.processes=3", "distributed.join_seconds=4"]
    keys = [*keys, f"run_dir={tmp_path}", *few]
    numbers = ["distributed.process_id=0", "distributed.process_id=2"]
    assert finish([start([*keys, number], devices=1) for number in numbers], 150) == [1, 1]
    assert capfd.readouterr().out.count("there came no process 1 of 3 (there are 0 on") == 2


def test_one_that_stands_still_is_taken_for_dead() -> None:
    command = [sys.executable, "-c", STANDS, f"127.0.0.1:{free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    running = [subprocess.Popen([*command, number], **pipes) for number in "01"]
    try:
        assert [process.stdout.readline() for process in running if process.stdout] == [
            "joined\n",
            "joined\n",
        ]
        running[1].send_signal(signal.SIGSTOP)
        assert running[0].wait(60) == -signal.SIGABRT
    finally:
        for process in running:
            process.kill()


def test_a_process_that_fails_takes_the_others_with_it(
    golden_keys: list[str], tmp_path: Path
) -> None:
    """Process 0 alone reads the data; where it is bad, nobody may wait an hour for its cache."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user"}]}\n')
    keys = [*golden_keys, f"run_dir={tmp_path / 'run'}", f"data.sources.gsm8k.path={bad}"]
    codes = finish(start_together([*keys, "train.steps=2"], processes=2, devices=1), seconds=150)
    assert codes[0] == 1
    assert codes[1] != 0
