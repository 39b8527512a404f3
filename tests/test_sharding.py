"""What the mesh does before there are devices; its layouts are tested with what is laid out."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COUNT = """
import os
from pathlib import Path
from posttrain.sharding import MeshConfig, make_mesh
mesh = make_mesh(MeshConfig())
names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
print(mesh.size, sum("XLAEigen" in name for name in names))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_devices_have_threads_for_several_collectives_each() -> None:
    """Else collectives wait for each other for ever: one run of ten steps in two, on 8 devices."""
    env = {k: v for k, v in os.environ.items() if k != "NPROC"} | {"JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env=env, text=True, capture_output=True, timeout=120
    )
    devices, threads = map(int, done.stdout.split())
    assert devices == 4, done.stderr
    assert threads >= 16
