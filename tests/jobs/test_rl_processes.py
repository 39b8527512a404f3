"""A run that learns online on two processes: one program samples, one process asks for rewards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from tests.jobs.rl_task import HERE, RL_KEYS
from tests.jobs.runs import Finished, Runner, finish, relative, start_together

KEYS = [*RL_KEYS, "kl.coef=0.1", "round.steps=2", "train.steps=4", "rollouts.every=1"]
KEYS += [f"rewards={{share: {{type: '{HERE}:share_told'}}}}", "optim.lr=1e-4"]


def test_two_processes_sample_and_learn_the_same_as_one(
    tiny_model: Path, tmp_path: Path, run_rl: Runner
) -> None:
    both = Finished(0, tmp_path / "both")
    keys = [*KEYS, f"model.path={tiny_model}", f"run_dir={both.folder}", "mesh.fsdp=2"]
    os.environ["TOLD"] = str(tmp_path / "told")
    try:
        assert finish(start_together(keys, processes=2, devices=1, job="rl")) == [0, 0]
        asked = {json.loads(line) for line in (tmp_path / "told").read_text().splitlines()}
        assert len(asked) == 1, "one process alone is asked for rewards"
        alone = run_rl(*KEYS, devices=2)
    finally:
        del os.environ["TOLD"]
    assert relative(both.losses[1:], alone.losses[1:]) < 1e-3
    np.testing.assert_allclose(
        [line["reward"] for line in both.metrics if "reward" in line],
        [line["reward"] for line in alone.metrics if "reward" in line],
    )
    for name in ("1.jsonl", "3.jsonl"):
        tokens = [
            [json.loads(line)["tokens"] for line in (run.folder / "rollouts" / name).open()]
            for run in (both, alone)
        ]
        assert tokens[0] == tokens[1]
