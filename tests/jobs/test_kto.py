"""`posttrain preference` on labelled answers, whole: KTO against TRL's figures.

That the layout of a step changes nothing: tests/train/test_step_losses.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.jobs.runs import Finished, Runner, relative

STEPS = "train.steps=10"


@pytest.fixture(scope="module")
def kto_keys(data_dir: Path) -> list[str]:
    """The settings of TRL's run. Its twins are never cut: the longest has 1,379 tokens."""
    return [
        *("loss.type=kto", "batch.examples=8", "data.kl_block=8", "data.seq_len=1408"),
        f"data.sources.prefs.path={data_dir}/golden/kto.jsonl",
        "batch.packing=best_fit",
    ]


@pytest.fixture(scope="module")
def cached(run_preference: Runner, kto_keys: list[str]) -> Finished:
    return run_preference(*kto_keys, STEPS, "export=false", devices=1)


def series(run: Finished, key: str) -> np.ndarray:
    return np.array([line.get(key, np.nan) for line in run.metrics])


def test_ten_steps_equal_trl(cached: Finished, data_dir: Path) -> None:
    """Loss and gradient norm within 1e-4 relative at every step.

    TRL subtracts sums of up to 6,000 nats in float32: its log-ratios are rounded to 5e-4, its
    rewards to 5e-5, its KL, a mean of eight, to 2e-4.
    """
    log = json.loads((data_dir / "golden" / "kto_b8.json").read_text())["log_history"]
    golden = [row for row in log if "loss" in row]
    assert len(golden) == len(cached.metrics) == 10
    want = {
        key: np.array([row.get(key, np.nan) for row in golden])
        for key in {key for row in golden for key in row}
    }
    for key in ("loss", "grad_norm", "entropy"):
        print(f"{key} {relative(series(cached, key), want[key]):.1e}", end=" ")
    for key in ("kl", *(f"{x}/{y}" for x in ("rewards", "logps") for y in ("chosen", "rejected"))):
        print(f"{key} {np.nanmax(np.abs(series(cached, key) - want[key])):.1e}", end=" ")
    for key in ("loss", "grad_norm", "entropy"):
        assert relative(series(cached, key), want[key]) < 1e-4, key
    np.testing.assert_allclose(series(cached, "kl"), want["kl"], rtol=1e-4, atol=5e-4)
    for side in ("chosen", "rejected"):  # NaN on both sides where a step has no such answer
        rewards, logps = f"rewards/{side}", f"logps/{side}"
        np.testing.assert_allclose(series(cached, rewards), want[rewards], rtol=1e-4, atol=5e-5)
        np.testing.assert_allclose(series(cached, logps), want[logps], atol=2e-3)
    margins = "rewards/margins"
    np.testing.assert_allclose(series(cached, margins), want[margins], rtol=1e-4, atol=1e-4)
    assert (series(cached, "examples") == 8).all()


def test_a_loss_without_twins_runs_and_evaluates(
    run_preference: Runner, tiny_pairs: list[str], data_dir: Path
) -> None:
    """On pairs, read as labelled answers, in two micro-batches."""
    golden = data_dir / "golden"
    keys = [*tiny_pairs, f"data.sources.prefs.path={golden}/prefs.jsonl", "loss.type=bco"]
    keys += [f"eval.sets.held={{path: {golden}/kto.jsonl, limit: 8}}", "eval.samples=1"]
    keys += [
        "eval.max_new_tokens=2",
        "batch.examples=4",
        "batch.accumulate=2",
        "train.steps=2",
        "export=false",
    ]
    run = run_preference(*keys, devices=1)
    assert len(run.metrics) == 2
    lines = [json.loads(x) for x in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/held/rewards/accuracies" in line for line in lines)
