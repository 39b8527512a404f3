"""What benchmarks share: their inputs, how often they repeat, which peers are asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.benchmarks import harness
from tests.benchmarks.inputs import Inputs, write_inputs


@pytest.fixture(scope="session")
def rounds() -> int:
    """BENCH_ROUNDS (default 3)."""
    return int(os.environ.get("BENCH_ROUNDS", "3"))


@pytest.fixture(scope="session")
def inputs(data_dir: Path) -> Inputs:
    return write_inputs(harness.FOLDER / "inputs", data_dir)


@pytest.fixture(scope="session")
def trl() -> None:
    """Skips unless BENCH_PEERS names TRL (`make bench PEERS=trl`)."""
    if "trl" not in os.environ.get("BENCH_PEERS", "").split(","):
        pytest.skip("make bench PEERS=trl compares with TRL, through the parity environment")


@pytest.fixture(scope="session")
def tunix() -> str:
    """The Python that has Tunix, where BENCH_PEERS names it; else "", and Tunix is left out.

    BENCH_TUNIX, or that of the environment which `make bench PEERS=trl,tunix` makes.
    """
    if "tunix" not in os.environ.get("BENCH_PEERS", "").split(","):
        return ""
    return os.environ.get("BENCH_TUNIX", str(harness.ROOT / ".venv-tunix/bin/python"))
