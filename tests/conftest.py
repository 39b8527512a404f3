"""The test bed: 8 fake CPU devices, one compile cache for all, and the folder of real data."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("NPROC", "32")  # threads, as sharding.make_mesh asks for where it comes first
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "test-compile"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder named by POSTTRAIN_TEST_DATA (default ../shared): real data, golden figures."""
    root = Path(os.environ.get("POSTTRAIN_TEST_DATA", ROOT.parent / "shared"))
    if not root.is_dir():
        pytest.skip(f"no test data at {root}: set POSTTRAIN_TEST_DATA")
    return root.resolve()


@pytest.fixture(scope="session")
def soak_rounds() -> int:
    """How often a soak test does its worst: POSTTRAIN_SOAK_ROUNDS (default 30; CI takes 3)."""
    return int(os.environ.get("POSTTRAIN_SOAK_ROUNDS", "30"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, pytest.TestReport]:
    """In CI the real data must be there: a skip for want of it is a failure."""
    report: pytest.TestReport = yield
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    if report.skipped and os.environ.get("CI") == "true" and "test data" in reason:
        report.outcome = "failed"
        report.longrepr = f"CI=true, and a test was skipped for want of its data: {reason}"
    return report
