"""A run that is told to stop goes on to the same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from posttrain.train.loop import PREEMPTED
from tests.jobs.runs import Finished, finish, start, wait_for_step

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
