"""Runs of `posttrain sft` in this process, on some of the fake devices."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from posttrain import config
from posttrain.jobs import sft
from tests.jobs.runs import GOLDEN, Finished, Runner


@pytest.fixture(scope="session")
def golden_keys(data_dir: Path) -> list[str]:
    """GOLDEN with the golden model and data, as key=value."""
    golden = data_dir / "golden"
    return [
        *GOLDEN,
        f"model.path={golden / 'model'}",
        f"data.sources.gsm8k.path={golden}/sft.jsonl",
    ]


@pytest.fixture(scope="session")
def run_sft(golden_keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """run_sft(*key=value, devices=8, folder=new) -> Finished, from the golden settings."""

    def run(*keys: str, devices: int = 8, folder: Path | None = None) -> Finished:
        from posttrain.train import setup  # what it imports is not needed to collect tests

        folder = folder or tmp_path_factory.mktemp("run")
        cfg = config.load(sft.Config, [], [*golden_keys, f"run_dir={folder}", *keys])
        code = setup.run(cfg, jax.devices()[:devices])
        return Finished(code, folder)

    return run
