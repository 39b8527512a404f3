"""The device mesh, the one table from logical axes to mesh axes, and its checks.

An *axis* is the mesh's, a *dim* a tensor's. Every weight names its dims logically beside its shape;
only LOGICAL_RULES says which mesh axis a logical name is laid on.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from posttrain.config import Config, ConfigError, runtime
from posttrain.types import Batch, Extremes, Mean, Routing, Terms, TokenOutputs

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

# A dim whose size its mesh axis does not divide is replicated for that tensor (partition_spec).
LOGICAL_RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,  # rows of activations
    "length": ("context",),  # positions of activations
    "layers": (),  # the scanned dim of stacked weights
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "head_dim": (),
    "lora": (),  # ranks of adapters, new tokens
    "norm": (),
}

for _type in (Batch, TokenOutputs, Routing, Mean, Extremes, Terms):
    jax.tree_util.register_dataclass(
        _type, data_fields=[f.name for f in dataclasses.fields(_type)], meta_fields=[]
    )


class MeshConfig(Config):
    """Sizes of the mesh axes. One of them may be -1: all the devices that the others leave."""

    data: int = runtime(1, help="copies of the model, each with its own rows")
    fsdp: int = runtime(-1, help="devices that share one copy's weights, each with its own rows")
    expert: int = runtime(
        1,
        help="devices that split a mixture's experts, each with its own rows (other weights: "
        "a copy each)",
    )
    context: int = runtime(1, help="devices that split each row's positions, for long rows")
    tensor: int = runtime(1, help="devices that split each matmul (heads, ffn, vocabulary)")


def mesh_shape(cfg: MeshConfig, n_devices: int) -> tuple[int, ...]:
    """The sizes of MESH_AXES over n_devices devices, -1 resolved.

    Raises ConfigError if the sizes do not use exactly n_devices.
    """
    sizes = [getattr(cfg, axis) for axis in MESH_AXES]
    said = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise ConfigError(f"{said}: each size must be positive, and at most one -1 (= the rest)")
    known = int(np.prod([size for size in sizes if size > 0]))
    if -1 in sizes:
        sizes[sizes.index(-1)] = n_devices // known
    if int(np.prod(sizes)) != n_devices:
        raise ConfigError(f"{said} does not fit {n_devices} devices: the product must be equal")
    return tuple(sizes)


def _let_collectives_wait() -> None:
    """More threads for several CPU devices, which XLA makes at their first use.

    It makes one for each device, or core if there are more of those. Of collectives that do not
    depend on each other devices may begin different ones; each holds its thread until the others
    join, who then have none left to join with: the process stands still and is killed after 40 s.
    """
    devices = jax.config.values.get("jax_num_cpu_devices", -1)
    if devices > 1:
        os.environ.setdefault("NPROC", str(max(4 * devices, os.cpu_count() or 1)))


def sizes_of_a_slice(shape: Sequence[int], slices: int) -> tuple[int, ...]:
    """The part of a mesh's sizes that lies in each of several TPU slices.

    Slices are joined by the data axis, whose only traffic are gradients: the network between them
    is slow. Raises ConfigError if they do not divide it.
    """
    if shape[0] % slices:
        raise ConfigError(
            f"mesh.data={shape[0]}: each of the {slices} slices holds whole copies of the model, "
            f"so it must be a multiple of {slices}"
        )
    return (shape[0] // slices, *shape[1:])


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over all devices of the run (or those given), axes MESH_AXES, Auto mode.

    Raises ConfigError if the sizes do not fit the devices, or the slices they lie in.
    """
    _let_collectives_wait()
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(cfg, len(devices))
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:  # jax.make_mesh refuses them
        one = sizes_of_a_slice(shape, slices)
        between = (slices, *(1 for _ in shape[1:]))
        laid = mesh_utils.create_hybrid_device_mesh(one, between, devices)
        return jax.sharding.Mesh(laid, MESH_AXES, axis_types=types)
    return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)


def batch_shards(mesh: Any) -> int:
    """How many blocks the rows of a micro-batch are cut into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def partition_spec(
    logical: Sequence[str | None], shape: Sequence[int] | None = None, mesh: Any = None
) -> PartitionSpec:
    """Logical dim names -> PartitionSpec by LOGICAL_RULES.

    With `shape` and `mesh`, a dim that its mesh axes do not divide is replicated instead.
    Raises ValueError on an unknown name or on two dims laid on one mesh axis.
    """
    entries: list[tuple[str, ...] | str | None] = []
    taken: dict[str, str] = {}
    for i, name in enumerate(logical):
        if name is not None and name not in LOGICAL_RULES:
            raise ValueError(f"logical axis {name!r} is not in LOGICAL_RULES {list(LOGICAL_RULES)}")
        axes = LOGICAL_RULES[name] if name is not None else ()
        for axis in axes:
            if axis in taken:
                raise ValueError(
                    f"{tuple(logical)}: {taken[axis]!r} and {name!r} collide on {axis!r}"
                )
            taken[axis] = str(name)
        if shape is not None and mesh is not None:
            parts = int(np.prod([mesh.shape[axis] for axis in axes]))
            if shape[i] % parts:
                axes = ()
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*entries)


def named_sharding(
    mesh: jax.sharding.Mesh, logical: Sequence[str | None], shape: Sequence[int] | None = None
) -> NamedSharding:
    """partition_spec on a concrete mesh."""
    return NamedSharding(mesh, partition_spec(logical, shape, mesh))


def constrain(x: jax.Array, logical: Sequence[str | None]) -> jax.Array:
    """Pins an activation's layout inside jit. Without a mesh in context it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical, x.shape, mesh))


@functools.cache
def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of a Batch's arrays [A, B, ...]: rows over BATCH_AXES, micro-batches one after another."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
