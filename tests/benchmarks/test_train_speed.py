"""`make bench`: what a training step costs on this machine, by the run's own metrics."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import jax
import pytest

from posttrain import config
from posttrain.jobs import sft
from posttrain.train import setup
from tests.jobs.runs import GOLDEN

pytestmark = pytest.mark.bench
STEPS = 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_the_golden_model(data_dir: Path, tmp_path: Path, dtype: str) -> None:
    golden = data_dir / "golden"
    keys = [
        *(key for key in GOLDEN if not key.startswith(("batch.", "model.dtype"))),
        f"model.dtype={dtype}",
        f"model.path={golden / 'model'}",
        f"data.sources.gsm8k.path={golden}/sft.jsonl",
        f"data.cache_dir={tmp_path}/cache",
        f"run_dir={tmp_path}/run",
        "batch.rows=8",
        f"train.steps={STEPS}",
        "export=false",
    ]
    assert setup.run(config.load(sft.Config, [], keys), jax.devices()[:1]) == 0
    text = (tmp_path / "run/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    later = [line for line in lines if line["step"] > 5]
    speeds = {
        name: statistics.median(line[name] for line in later)
        for name in ("tokens_per_second", "trained_tokens_per_second")
    }
    print(f"\n{dtype}, 8 rows of 512, one device: {speeds}")
    assert len(later) == STEPS - 5
    assert all(value > 0 for value in speeds.values())
