"""What reaches metrics.jsonl: plain numbers, means divided once, no line twice after a resume."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from posttrain.metrics import SUPERSEDED, LogConfig, Progress, Writer, flatten
from posttrain.types import Extremes, Mean

QUIET = LogConfig(tensorboard=False)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("steps", [(3, 1), (0, 2)])
def test_a_trace_of_no_steps_is_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="1 <= first <= last"):
        LogConfig(trace_steps=steps)


def test_flatten_divides_once_and_names_sources() -> None:
    flat = flatten(
        {
            "loss": Mean(np.float32(6), np.float32(4)),
            "grad_norm": np.float32(2),
            "loss_by_source": Mean(np.array([3.0, 0.0]), np.array([2.0, 0.0])),
        },
        ["chat", "absent"],
    )
    assert flat == {"loss": 1.5, "grad_norm": 2.0, "loss/chat": 1.5}


def test_extremes_stand_beside_their_group() -> None:
    ends = Extremes(np.float32(1), np.float32(2))
    flat = flatten({"reward": ends, "sampling/x": ends, "none": Extremes(np.inf, -np.inf)}, [])
    assert flat == {"min_reward": 1, "max_reward": 2, "sampling/x/min": 1, "sampling/x/max": 2}


def test_labelled_answers_have_a_margin_where_there_are_both() -> None:
    rewards = {"rewards/chosen": Mean(6.0, 4.0), "rewards/rejected": Mean(-1.0, 2.0)}
    assert flatten(rewards, [])["rewards/margins"] == 2.0
    one = {**rewards, "rewards/rejected": Mean(0.0, 0.0)}
    assert flatten(one, []) == {"rewards/chosen": 1.5}
    pairs = {**rewards, "rewards/margins": Mean(3.0, 1.0)}
    assert flatten(pairs, [])["rewards/margins"] == 3.0


def test_pitfall_13_a_mean_over_nothing_is_left_out_not_zero() -> None:
    assert flatten({"loss": Mean(np.float32(0), np.float32(0))}, []) == {}
    assert np.isnan(Mean(0.0, 0.0).value)


def test_resume_sets_later_lines_aside_and_loses_none(tmp_path: Path) -> None:
    writer = Writer(tmp_path, QUIET, primary=True)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the process was killed while it wrote
    writer = Writer(tmp_path, QUIET, primary=True, resumed_at=3)
    writer.write(4, {"loss": 40.0})
    writer.close()
    assert [(x["step"], x["loss"]) for x in lines(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]
    assert (tmp_path / SUPERSEDED).read_text().count("\n") == 3


def test_only_the_primary_process_writes(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", QUIET, primary=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_files_are_written_by_default(tmp_path: Path) -> None:
    writer = Writer(tmp_path, LogConfig(), primary=True)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch installed")
def test_tensorboard_files_need_no_torch(tmp_path: Path) -> None:
    """And torch can be imported after them all the same."""
    program = f"""
import sys
from pathlib import Path
from posttrain.metrics import LogConfig, Writer
writer = Writer(Path({str(tmp_path)!r}), LogConfig(), primary=True)
writer.write(1, {{"loss": 1.0}})
writer.close()
assert "torch" not in sys.modules
import importlib.util
assert importlib.util.find_spec("torch")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_not_finite_is_written_as_valid_json(tmp_path: Path) -> None:
    writer = Writer(tmp_path, QUIET, primary=True)
    writer.write(1, {"loss": float("nan")})
    writer.close()
    assert lines(tmp_path / "metrics.jsonl")[0]["loss"] == "nan"


def test_progress_speaks_in_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress("train", 10, 0, every=5, primary=True)
    for step in range(1, 11):
        progress.update(step, "loss 1.0")
    progress.close()
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == ["5/10", "10/10"]
    assert all("left" in line for line in said)
