"""The test bed: 8 fake CPU devices, one compile cache for all, and the folder of real data."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "posttrain-test-compile-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder named by POSTTRAIN_TEST_DATA (default ../shared): real data, golden figures."""
    root = Path(os.environ.get("POSTTRAIN_TEST_DATA", Path(__file__).parents[2] / "shared"))
    if not root.is_dir():
        pytest.skip(f"no test data at {root}: set POSTTRAIN_TEST_DATA")
    return root.resolve()
