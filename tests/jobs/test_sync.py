"""`posttrain preference` with a reference that follows the policy: interrupted, and evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from posttrain.train import loop
from tests.jobs.runs import Runner


def test_a_run_goes_on_with_the_reference_that_it_had(
    run_preference: Runner,
    tiny_pairs: list[str],
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit. After the update in which the reference becomes the policy, an evaluation finds
    no margin."""
    held = f"eval.sets.held={{path: {data_dir / 'golden' / 'prefs.jsonl'}, limit: 4}}"
    keys = [*tiny_pairs, held, "eval.samples=0", "reference=live", "eval.every=5"]
    keys += ["reference_sync.every=3", "reference_sync.mixup=1", "train.steps=6"]
    folders = [tmp_path / "whole", tmp_path / "parts"]
    run_preference(*keys, devices=1, folder=folders[0])
    with monkeypatch.context() as patched:  # the reference of step 3 is in the checkpoint of step 4
        calls = iter([False, False, False, True])
        patched.setattr(loop.Preemption, "reached", lambda _: next(calls))
        assert run_preference(*keys, devices=1, folder=folders[1]).code == loop.PREEMPTED
    run_preference(*keys, devices=1, folder=folders[1])
    lines = [
        [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in folders
    ]
    series = [[x["loss"] for x in of if "loss" in x] for of in lines]
    assert len(series[0]) == 6
    assert series[0] == series[1]
    assert len(set(series[0])) > 3
    for of in lines:
        five, last = (x for x in of if "eval/held/rewards/margins" in x)
        assert last["eval/held/rewards/margins"] == pytest.approx(0, abs=1e-5)
        assert last["eval/held/loss"] == pytest.approx(np.log(2))
        assert abs(five["eval/held/rewards/margins"]) > 1e-3
    for name, want in load_file(folders[0] / "export" / "model.safetensors").items():
        found = load_file(folders[1] / "export" / "model.safetensors")[name]
        np.testing.assert_array_equal(found, want, err_msg=name)
