"""What the checks are given: the fake devices, folders of the test's own, one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.agree import Channel
from posttrain.doctor.base import Subject
from posttrain.sharding import MeshConfig


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    folders = {name: tmp_path / name for name in ("run_dir", "cache_dir")}
    return Subject(**folders, mesh=MeshConfig(), peak_tflops=None, channel=Channel(1))
