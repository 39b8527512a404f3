"""Two rounds of rejection sampling and SFT on what was kept: the model finds that working a sum out
helps, since that is what most right answers have in common.

The start is the demo's model after SFT, whose answers to sums are worked out one time in five.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.config_yaml import to_yaml
from posttrain.jobs import demo

pytestmark = pytest.mark.soak

SEEDS = (3, 4, 5)  # the defaults of the demo were chosen on 0, 1 and 2
FEW_ROUNDS = 20  # fewer, and one seed is enough
TASK = [
    *("task.type=arithmetic", "task.terms=[4,6]", "model.dtype=float32"),
    *("sampling.max_new_tokens=44", "slots=256"),
]


def posttrain(*words: str) -> str:
    """What the command prints, on as many devices as it takes by itself."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    command = [sys.executable, "-m", "posttrain.cli", *words]
    done = subprocess.run(
        command, env=env, check=True, timeout=1800, capture_output=True, text=True
    )
    return done.stdout


def start_from(folder: Path, seed: int) -> Path:
    """The export of the demo's SFT."""
    cfg = demo.Config(work_dir=folder, seed=seed)
    demo.write_inputs(cfg)
    for name in ("base", "sft"):
        config = folder / f"{name}.yaml"
        config.write_text(to_yaml(demo.stage_config(cfg, name)))
        posttrain("sft", str(config))
    return folder / "sft" / "export"


def accuracy(model: Path) -> float:
    """Of four answers to each of 256 held-out sums, at temperature 1."""
    said = posttrain("evaluate", f"model.path={model}", *TASK, "prompts=256", "n=4")
    print(said)
    found = re.search(r"rewards/correct +([\d.]+)", said)
    assert found is not None
    return float(found[1])


def one_round(model: Path, folder: Path, number: int, seed: int) -> Path:
    """The export of an SFT on the best right answer to each of 800 sums."""
    out = folder / f"kept{number}.jsonl"
    kept = ["prompts=800", "prompts_at_once=800", "n=8", "keep.at_least=1", f"out={out}"]
    print(posttrain("rejection", f"model.path={model}", *TASK, *kept, f"task.seed={seed + number}"))
    run_dir = folder / f"round{number}"
    posttrain(
        *("sft", f"model.path={model}", "model.dtype=float32", f"run_dir={run_dir}"),
        *(f"data.sources.kept.path={out}", "data.seq_len=64", "data.workers=0"),
        *(f"data.cache_dir={folder / 'cache'}", "batch.rows=16", "log.tensorboard=false"),
        *("optim.lr=1e-3", "optim.warmup=5", "train.steps=60", "model.vocab_multiple=1"),
    )
    return run_dir / "export"


def test_two_rounds_of_rejection_and_sft_teach_to_work_sums_out(
    tmp_path: Path, soak_rounds: int
) -> None:
    for seed in SEEDS if soak_rounds >= FEW_ROUNDS else SEEDS[:1]:
        folder = tmp_path / str(seed)
        model = start_from(folder, seed)
        found = [accuracy(model)]
        for number in (1, 2):
            model = one_round(model, folder, number, seed)
            found.append(accuracy(model))
        print(f"seed {seed}: {found}")
        assert found[0] < 0.5
        assert found[1] > found[0] + 0.1
        assert found[2] > found[1] + 0.1
