"""Saves that fail: how often they are tried again, and what is said when nothing helps."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain import saving
from posttrain.saving import Saver, full_disk
from tests.namespaces import needs_namespaces

FULL = "RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [os_error_code='28']"


class Orbax:
    """What Saver needs of orbax's checkpointer. script: of each save, which error it meets: "" for
    none, "at once", "behind" or, when the step is there, "afterwards" for when."""

    def __init__(self, script: list[str], error: Exception):
        self.script, self.error = script, error
        self.events: list[Any] = []
        self.saved: list[int] = []

    @property
    def latest(self) -> Any:
        return SimpleNamespace(step=self.saved[-1]) if self.saved else None

    def save_async(self, step: int, state: Any, **_: Any) -> Any:
        fate = self.script.pop(0)
        self.events.append(("save", step, state))
        if fate == "at once":
            raise self.error

        def result() -> None:
            if fate in ("", "afterwards"):
                self.saved.append(step)
            if fate:
                raise self.error

        return SimpleNamespace(result=result)

    def close(self) -> None:
        self.events.append("close")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """make(script, error, retries) -> (a Saver, the stand-in for orbax); pauses are its events."""

    def made(script: list[str], error: Exception, retries: int = 3) -> tuple[Saver, Orbax]:
        orbax = Orbax(script, error)
        monkeypatch.setattr(saving.time, "sleep", orbax.events.append)
        return Saver(tmp_path, lambda: orbax, retries), orbax

    return made


def test_a_step_that_is_there_is_not_saved_again(make: Any) -> None:
    """An older one that could not be removed is no reason: orbax refuses a step that it has."""
    saver, orbax = make(["afterwards"], OSError("not removed"))
    saver.save(1, "state", None, wait=True)
    assert orbax.saved == [1]
    assert orbax.events == [("save", 1, "state"), "close", 2]


def test_a_save_that_fails_behind_the_steps_is_made_up_for_at_the_next(
    make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    saver, orbax = make(["behind", "at once", "behind", ""], ValueError("a cable fell out"))
    saver.save(5, "state 5", None, wait=False)
    assert orbax.events == [("save", 5, "state 5")]
    saver.save(10, "state 10", None, wait=False)
    again = ("save", 10, "state 10")
    assert orbax.events[1:] == ["close", 2, again, "close", 4, again, "close", 8, again]
    assert orbax.saved == [10]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "checkpoint: ValueError: a cable fell out: saving step 10 again in 2 s"
    assert len(said) == 3
    saver.save(10, "state 10", None, wait=True)  # it is there
    assert orbax.script == []


def test_the_last_save_is_waited_for(make: Any) -> None:
    saver, orbax = make(["behind", ""], ValueError("x"))
    saver.save(5, "state", None, wait=True)
    assert orbax.saved == [5]


def test_in_the_end_the_run_stops_and_says_why(make: Any) -> None:
    saver, orbax = make(["", *["behind"] * 3], ValueError("the bucket is gone"), retries=1)
    saver.save(5, "state", None, wait=True)
    saver.save(10, "state", None, wait=False)
    with pytest.raises(OSError, match=r"step 15 could not be saved in .*the bucket is gone; given "
                       r"up after 2 attempts, checkpoint 5 stands") as raised:  # fmt: skip
        saver.save(15, "state", None, wait=False)
    assert raised.value.errno is None
    assert [event for event in orbax.events if isinstance(event, int)] == [2]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (ValueError(FULL), errno.ENOSPC),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), errno.EDQUOT),
        (OSError(errno.EIO, "a bad disk"), 0),
        (ValueError("RESOURCE_EXHAUSTED: too many requests"), 0),
    ],
)
def test_a_full_disk_is_called_that(
    make: Any, tmp_path: Path, error: Exception, number: int
) -> None:
    saver, _ = make(["at once"], error, retries=0)
    with pytest.raises(OSError, match=f"in {tmp_path}: ") as raised:
        saver.save(1, "state", None, wait=False)
    said = str(raised.value)
    assert (raised.value.errno or 0) == number
    assert ("the disk is full" in said) == (number == errno.ENOSPC)
    assert ("the quota is used up" in said) == (number == errno.EDQUOT)
    assert ("MiB are free there" in said) == bool(number)


def test_the_cause_of_an_error_counts_too() -> None:
    error = RuntimeError("the commit failed")
    error.__cause__ = OSError(errno.ENOSPC, "full")
    assert full_disk(error) == errno.ENOSPC


FILL = """
import sys, jax, numpy, pathlib
from posttrain import saving
from posttrain.checkpoint import CheckpointConfig, Checkpoints
folder, pauses = pathlib.Path(sys.argv[1]), []
def pause(seconds):
    pauses.append(seconds)
    if len(pauses) == 3:
        (folder / "others").unlink()
saving.time.sleep = pause
noise = jax.numpy.asarray(numpy.random.default_rng(0).integers(0, 2**31, 700_000))
(folder / "others").write_bytes(b"x" * 5_000_000)
run = Checkpoints(folder, CheckpointConfig(retries=1))
try:
    run.save(1, {"w": noise}, wait=True)
except OSError as error:
    print(error.errno, pauses, run.latest())
run = Checkpoints(folder, CheckpointConfig(retries=2))
run.save(1, {"w": noise}, wait=True)
run.close()
print(pauses, run.latest(), sorted(p.name for p in (folder / "checkpoints").iterdir()))
"""


@needs_namespaces
def test_a_disk_that_is_full_and_then_is_not(tmp_path: Path) -> None:
    """A real one of 6 MiB, with room for a checkpoint of 2.7 once another file is gone."""
    mount = f"mount -t tmpfs -o size=6m none {tmp_path} && exec {sys.executable} -c "
    line = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mount} "$1" "$2"']
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [*line, "sh", FILL, str(tmp_path)], env=env, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = done.stdout.splitlines()
    assert first == f"{errno.ENOSPC} [2] None"
    assert second == "[2, 2, 4] 1 ['1']"
