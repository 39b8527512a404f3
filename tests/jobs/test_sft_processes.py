"""One run on several processes, runs that are told to stop, runs that go on elsewhere."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from posttrain.train.loop import PREEMPTED
from tests.jobs.runs import Finished, Runner, finish, relative, start, start_together, wait_for_step

LONG = "train.steps=60"  # a signal comes before its end


@pytest.fixture(scope="module")
def keys(golden_keys: list[str], tiny_sft: list[str]) -> list[str]:
    return [*golden_keys, *tiny_sft]


@pytest.fixture(scope="module")
def undisturbed(keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run in a process with one device, as the runs that are held to its bits.

    XLA cuts a CPU's matmuls among threads by how many devices the process has, idle ones too:
    the last bits of a run depend on that number.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    running = start([*keys, f"run_dir={folder}", LONG], devices=1)
    assert finish([running]) == [0]
    return Finished(0, folder)


def test_two_processes_make_the_same_run_and_another_host_count_resumes_it(
    keys: list[str], tiny_sft: list[str], tmp_path: Path, run_sft: Runner
) -> None:
    """1 process against 2: loss within 1e-5, parameters within 1e-5 relative L2; then 2 -> 1."""
    alone = run_sft(*tiny_sft, "train.steps=10", devices=1)
    keys = [*keys, f"run_dir={tmp_path}", "train.steps=6", "mesh.data=2", "mesh.fsdp=2"]
    assert finish(start_together(keys, processes=2, devices=2)) == [0, 0]
    both = Finished(0, tmp_path)
    assert relative(both.losses, alone.losses[:6]) < 1e-5
    resumed = run_sft(*tiny_sft, "train.steps=10", devices=1, folder=tmp_path)
    assert [line["step"] for line in resumed.metrics] == list(range(1, 11))
    assert relative(resumed.losses, alone.losses) < 1e-5
    for name, want in alone.weights.items():
        apart = np.linalg.norm(resumed.weights[name] - want) / np.linalg.norm(want)
        assert apart < 1e-5, (name, apart)


def test_sigterm_saves_leaves_with_the_preemption_code_and_resumes_to_the_bit(
    keys: list[str], undisturbed: Finished, tmp_path: Path
) -> None:
    keys = [*keys, f"run_dir={tmp_path}", LONG]
    running = start(keys, devices=1)
    wait_for_step(tmp_path, 2, running)
    running.send_signal(signal.SIGTERM)
    assert finish([running]) == [PREEMPTED]
    stopped = Finished(PREEMPTED, tmp_path)
    assert 2 <= len(stopped.metrics) < 60
    assert not (tmp_path / "export").exists()
    assert finish([start(keys, devices=1)]) == [0]
    assert [line["step"] for line in stopped.metrics] == list(range(1, 61))
    for name, want in undisturbed.weights.items():
        np.testing.assert_array_equal(stopped.weights[name], want, err_msg=name)
    tokens = [line["num_tokens"] for line in stopped.metrics]
    assert tokens == [line["num_tokens"] for line in undisturbed.metrics]


def test_sigterm_to_one_process_stops_all_at_the_same_step(keys: list[str], tmp_path: Path) -> None:
    keys = [*keys, f"run_dir={tmp_path}", "train.steps=500"]
    running = start_together([*keys, "train.epochs=null"], processes=2, devices=1)
    wait_for_step(tmp_path, 3, running[0])
    running[1].send_signal(signal.SIGTERM)
    assert finish(running) == [PREEMPTED, PREEMPTED]
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert steps[-1] == Finished(0, tmp_path).metrics[-1]["step"]


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
