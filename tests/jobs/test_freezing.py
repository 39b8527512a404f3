"""Runs that train a part of the parameters: what they keep, and over what they go on
(train/starting.py)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from posttrain import checkpoint, config
from posttrain.config import ConfigError
from posttrain.jobs import convert
from tests.jobs.runs import Finished, Runner

FROZEN = ["train.frozen=[embedding, '*norm']"]


@pytest.fixture(scope="module")
def partly(run_sft: Runner, tiny_sft: list[str]) -> Finished:
    return run_sft(*tiny_sft, *FROZEN, "train.steps=4", "checkpoint.every=2", devices=1)


def test_what_is_frozen_stays_and_is_in_no_checkpoint(partly: Finished, tiny_model: Path) -> None:
    base = load_file(tiny_model / "model.safetensors")
    assert partly.weights.keys() == base.keys()
    for name, array in partly.weights.items():
        stays = "norm" in name or "embed" in name
        assert np.array_equal(array, base[name]) == stays, name
    saved = checkpoint.saved_params(str(partly.folder))
    assert "head" in saved
    assert not any("norm" in path or "embedding" in path for path in saved)


def test_a_resumed_run_ends_in_the_same_bits(
    partly: Finished, run_sft: Runner, tiny_sft: list[str], tmp_path: Path
) -> None:
    """Its last checkpoint is taken away: it makes the steps from the one before again."""
    copy = tmp_path / "run"
    shutil.copytree(partly.folder, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    keys = [*tiny_sft, *FROZEN, "train.steps=4", "checkpoint.every=2"]
    again = run_sft(*keys, devices=1, folder=copy)
    assert len(again.metrics) == 4
    for name, want in partly.weights.items():
        np.testing.assert_array_equal(again.weights[name], want, err_msg=name)


def test_its_checkpoint_is_exported_and_started_from_whole(
    partly: Finished, run_sft: Runner, tiny_sft: list[str], tmp_path: Path
) -> None:
    cfg = config.load(convert.Config, [], [f"source={partly.folder}", f"out={tmp_path}"])
    assert convert.run(cfg) == 0
    found = load_file(tmp_path / "model.safetensors")
    for name, want in partly.weights.items():
        np.testing.assert_array_equal(found[name], want, err_msg=name)
    source = f"checkpoint.init_from={partly.folder}"
    full = run_sft(*tiny_sft, source, "train.steps=1", devices=1)
    keys = [*tiny_sft, f"model.path={partly.folder / 'export'}"]
    want = run_sft(*keys, "train.steps=1", devices=1)
    np.testing.assert_array_equal(full.losses, want.losses)
    # a run that began from another's weights has its frozen ones from there
    again = run_sft(*tiny_sft, *FROZEN, source, "train.steps=1", devices=1)
    third = run_sft(
        *tiny_sft, f"checkpoint.init_from={again.folder}", "train.steps=1", devices=1
    )  # fmt: skip
    assert third.losses[0] < full.losses[0]


def test_over_other_frozen_parameters_nothing_goes_on(
    run_sft: Runner, tiny_sft: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    keys = [*tiny_sft, *FROZEN, f"model.path={base}"]
    run = run_sft(*keys, "train.steps=1", devices=1)
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 3] += 1
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"left frozen are others now .*: put them back"):
        run_sft(*keys, "train.steps=2", devices=1, folder=run.folder)
    source = f"checkpoint.init_from={run.folder}"
    with pytest.raises(ValueError, match=r"model\.path does not hold the others as it had them"):
        run_sft(*tiny_sft, f"model.path={base}", source, "train.steps=1", devices=1)


def test_patterns_are_read_before_the_data(run_sft: Runner, tiny_sft: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train\.frozen: 'embeding' is no parameter's name"):
        run_sft(*tiny_sft, "train.frozen=[embeding]", "train.steps=1", devices=1)
