"""Four processes of two devices: the run that one process makes, told to stop, killed, resumed."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from posttrain.checkpoint import saved_steps
from posttrain.train.loop import PREEMPTED
from tests.jobs.runs import (
    Finished,
    Runner,
    finish,
    l2_apart,
    relative,
    start_together,
    wait_for_step,
)

STEPS = 16
LIMIT = 60  # seconds, of which 10 are those after which a silent process is taken for dead


@dataclass(frozen=True)
class Story:
    """One folder, in which 4 x 2 devices train until SIGTERM, again until SIGKILL, then 2 x 2."""

    run: Finished
    told: list[int]
    """Exit codes of those of whom one had SIGTERM."""
    stopped_at: int
    saved_then: list[int]
    killed: list[int]
    """Exit codes of those of whom the second was killed."""
    lost: int
    """The step they were at."""
    ended: list[int]


def line_of(folder: Path) -> int:
    return Finished(0, folder).metrics[-1]["step"]


@pytest.fixture(scope="module")
def settings(tiny_sft: list[str]) -> list[str]:
    return [*tiny_sft, "batch.examples=8", f"train.steps={STEPS}", "train.epochs=null"]


@pytest.fixture(scope="module")
def story(
    golden_keys: list[str], settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Story:
    folder = tmp_path_factory.mktemp("story")
    keys = [*golden_keys, *settings, f"run_dir={folder}", "checkpoint.every=3"]
    keys += ["distributed.silent_seconds=10"]
    four = [*keys, "mesh.data=2", "mesh.fsdp=4"]

    running = start_together(four, processes=4, devices=2)
    wait_for_step(folder, 3, running[0])
    running[2].send_signal(signal.SIGTERM)
    told = finish(running)
    stopped_at, saved_then = line_of(folder), saved_steps(folder)

    running = start_together(four, processes=4, devices=2)
    wait_for_step(folder, stopped_at + 4, running[0])
    running[1].kill()
    killed = finish(running, LIMIT)
    lost = line_of(folder)

    ended = finish(start_together(keys, processes=2, devices=2))
    return Story(Finished(0, folder), told, stopped_at, saved_then, killed, lost, ended)


def test_sigterm_to_one_saves_the_same_step_of_all(story: Story) -> None:
    assert story.told == [PREEMPTED] * 4
    assert 3 <= story.stopped_at < STEPS
    assert story.saved_then[-1] == story.stopped_at


def test_the_death_of_one_ends_all_with_a_code_that_is_retried(story: Story) -> None:
    assert story.killed[1] == -signal.SIGKILL
    assert not {0, 2, PREEMPTED} & {*story.killed}
    assert story.stopped_at < story.lost < STEPS


def test_two_go_on_to_the_run_that_one_process_makes(
    story: Story, settings: list[str], run_sft: Runner
) -> None:
    """The same batches on 8 devices of one process and on 1: each loss, and the weights."""
    assert story.ended == [0, 0]
    assert [line["step"] for line in story.run.metrics] == list(range(1, STEPS + 1))
    for devices, mesh in ((8, ["mesh.data=2", "mesh.fsdp=4"]), (1, [])):
        alone = run_sft(*settings, *mesh, devices=devices)
        assert relative(story.run.losses, alone.losses) < 1e-5
        for what in ("num_tokens", "examples", "epoch"):
            assert [x[what] for x in story.run.metrics] == [x[what] for x in alone.metrics]
        apart = l2_apart(story.run, alone)
        assert max(apart.values()) < 1e-5, apart
