"""What the mesh does before there are devices; its layouts are tested with what is laid out."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys

import pytest

from posttrain.config import ConfigError
from posttrain.sharding import FSDP_AXES, MESH_AXES, MeshConfig, make_mesh, mesh_shape

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


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device of one of several TPU slices."""

    id: int
    slice_index: int
    device_kind: str = "stand-in"
    platform: str = "stand-in"
    process_index: int = 0
    client: None = None


def test_slices_are_joined_by_the_data_axis_alone() -> None:
    """jax.make_mesh refuses several slices; an fsdp axis over two would gather between them."""
    devices = [Device(i, slice_index=i % 2) for i in range(8)]
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), devices)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == (4, 2)
    slices = [{device.slice_index for device in row.flat} for row in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]
    with pytest.raises(ConfigError, match=r"mesh\.data=1: each of the 2 slices"):
        make_mesh(MeshConfig(), devices)


@pytest.mark.parametrize(
    ("sizes", "slice_", "laid"),
    [
        ({}, (16, 16, 1), (16, 16)),
        ({"tensor": 4}, (16, 16, 1), (16, 4)),
        ({"data": 16}, (16, 16, 1), (16, 1)),  # one dim holds them
        ({}, (4, 8, 1), (8, 4)),
        ({}, (4, 4, 4), (4, 16)),
        ({"fsdp_inner": 1}, (4, 4, 1), (16, 1)),
        ({"fsdp_inner": 2}, (), (4, 2)),
        ({}, (), (8, 1)),
    ],
)
def test_fsdp_lies_along_one_dim_of_a_slice_after_the_other(
    sizes: dict[str, int], slice_: tuple[int, ...], laid: tuple[int, int]
) -> None:
    shape = mesh_shape(MeshConfig(**sizes), math.prod(slice_) if slice_ else 8, slice_)
    found = dict(zip(MESH_AXES, shape, strict=True))
    assert tuple(found[axis] for axis in FSDP_AXES) == laid


def test_the_inner_axis_has_a_part_of_fsdp() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.fsdp_inner=3 does not divide mesh\.fsdp=8"):
        mesh_shape(MeshConfig(fsdp_inner=3), 8)
