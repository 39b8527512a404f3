"""`posttrain demo` as it is shipped, on seeds that its settings were not chosen on: what it claims.

A seed takes minutes, too long for CI to run three: it asks for few rounds and gets the first seed
alone: the settings are the same for all, so that one finds what breaks the story.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.soak

SEEDS = (6, 7, 8)  # no setting of the demo was chosen on them
FEW_ROUNDS = 20  # fewer, and one seed is enough

BASE = ("base, plain text", "base, chat")
# whether a sum is worked out unasked is left to chance before GRPO, and so is its result
KINDS = ("fact", "second turn", "sum, thinking")
TUNED = ("SFT", "DPO", "GRPO")


def run_demo(folder: Path, seed: int) -> dict[str, Any]:
    """The report of a whole run, on as many devices as it takes by itself."""
    command = [sys.executable, "-m", "posttrain.cli", "demo", f"work_dir={folder}", f"seed={seed}"]
    env = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    subprocess.run(command, env=env, check=True, timeout=1800)
    return json.loads((folder / "report.json").read_text())


def check(report: dict[str, Any]) -> None:
    """What README and docs say of the demo. Accuracy is held at the temperature that is shown."""
    assert [of["temperature"] for of in report["rates"]] == [0.7, 1.0]
    for of in report["rates"]:
        rate = {
            name: {k: v["value"] for k, v in rates.items()} for name, rates in of["models"].items()
        }
        for name, rates in rate.items():
            print(report["seed"], of["temperature"], name, rates)
        assert all(rate[model]["stops by itself"] < 0.10 for model in BASE)
        for model in TUNED:
            assert rate[model]["stops by itself"] > 0.95
            assert rate[model]["keeps to one turn"] > 0.95
            assert rate[model]["follows system prompt"] > 0.90
        greets = "preferred: greets"
        assert rate["DPO"][greets] >= rate["SFT"][greets] + 0.30
        if of["temperature"] == 0.7:
            kept = {model: sum(rate[model][f"right: {kind}"] for kind in KINDS) for model in rate}
            assert kept["DPO"] >= kept["SFT"] - 0.03 * len(KINDS)
        if of["temperature"] == 1.0:
            assert rate["DPO"]["right: sum"] < 0.40
            assert rate["GRPO"]["right: sum"] > 0.80


def test_the_story_is_true(tmp_path: Path, soak_rounds: int) -> None:
    for seed in SEEDS if soak_rounds >= FEW_ROUNDS else SEEDS[:1]:
        check(run_demo(tmp_path / f"demo-{seed}", seed))
