"""The device mesh, the one table from logical axes to mesh axes, and its checks.

An *axis* is the mesh's, a *dim* a tensor's. Every weight names its dims logically beside its shape;
only LOGICAL_RULES says which mesh axis a logical name is laid on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from posttrain.config import Config, ConfigError, runtime
from posttrain.types import Batch, Extremes, Mean, Routing, Terms, TokenOutputs

FSDP_AXES = ("fsdp", "fsdp_inner")
"""What mesh.fsdp is laid on: in a TPU slice of two dims and more the second axis has a part of it,
elsewhere one device. Weights are gathered along the last of them first, and gradients scattered in
the other order: the TPU compiler sums along one dim of a slice and scatters as it goes, but over
all dims at once it sums whole gradients on every device."""
MESH_AXES = ("data", *FSDP_AXES, "expert", "context", "tensor")
BATCH_AXES = ("data", *FSDP_AXES, "expert")

# A dim whose size its mesh axis does not divide is replicated for that tensor (partition_spec).
LOGICAL_RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,  # rows of activations
    "length": ("context",),  # positions of activations
    "layers": (),  # the scanned dim of stacked weights
    "embed": FSDP_AXES,
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
    fsdp_inner: int = runtime(
        0,
        ge=0,
        help="those of fsdp along a mesh axis of their own, so that gradients are scattered one "
        "axis after the other; 0 = by the shape of the TPU slice, 1 = there is one axis",
    )
    expert: int = runtime(
        1,
        help="devices that split a mixture's experts, each with its own rows (other weights: "
        "a copy each)",
    )
    context: int = runtime(1, help="devices that split each row's positions, for long rows")
    tensor: int = runtime(1, help="devices that split each matmul (heads, ffn, vocabulary)")


def mesh_shape(cfg: MeshConfig, n_devices: int, torus: Sequence[int] = ()) -> tuple[int, ...]:
    """The sizes of MESH_AXES over n_devices devices, -1 resolved.

    torus: the dims of the TPU slice, by which mesh.fsdp is laid on its axes where mesh.fsdp_inner
    is 0. Raises ConfigError if the sizes do not use exactly n_devices.
    """
    names = [axis for axis in MESH_AXES if axis != "fsdp_inner"]
    sizes = {axis: getattr(cfg, axis) for axis in names}
    said = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    values = list(sizes.values())
    if any(size == 0 or size < -1 for size in values) or values.count(-1) > 1:
        raise ConfigError(f"{said}: each size must be positive, and at most one -1 (= the rest)")
    rest = n_devices // math.prod(size for size in values if size > 0)
    sizes = {axis: rest if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != n_devices:
        raise ConfigError(f"{said} does not fit {n_devices} devices: the product must be equal")
    fsdp = sizes["fsdp"]
    inner = cfg.fsdp_inner or _inner(fsdp, torus)
    if fsdp % inner:
        raise ConfigError(f"mesh.fsdp_inner={inner} does not divide mesh.fsdp={fsdp}")
    sizes |= {"fsdp": fsdp // inner, "fsdp_inner": inner}
    return tuple(sizes[axis] for axis in MESH_AXES)


def _inner(fsdp: int, torus: Sequence[int]) -> int:
    """1 where one dim of the slice holds them all; else what one dim leaves, the longest it can."""
    if fsdp <= max(torus, default=fsdp):
        return 1
    return fsdp // max((dim for dim in torus if fsdp % dim == 0), default=fsdp)


def _torus(devices: Sequence[Any]) -> tuple[int, ...]:
    """The dims of the TPU slice (of several: of each), () where devices lie on none."""
    places = {tuple(getattr(device, "coords", ())) for device in devices}
    dims = tuple(len(set(along)) for along in zip(*places, strict=True))
    return dims if math.prod(dims) == len(places) else ()


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
    shape = mesh_shape(cfg, len(devices), _torus(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # an axis may be shorter than each dim of a slice
    if slices > 1:
        one = sizes_of_a_slice(shape, slices)
        between = (slices, *(1 for _ in shape[1:]))
        laid = mesh_utils.create_hybrid_device_mesh(
            one, between, devices, allow_split_physical_axes=True
        )
    else:
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.sharding.Mesh(laid, MESH_AXES, axis_types=types)


def batch_shards(mesh: Any) -> int:
    """How many blocks the rows of a micro-batch are cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def partition_spec(
    logical: Sequence[str | None],
    shape: Sequence[int] | None = None,
    mesh: Any = None,
    gathered: Sequence[str] = (),
) -> PartitionSpec:
    """Logical dim names -> PartitionSpec by LOGICAL_RULES.

    With `shape` and `mesh`, a dim that its mesh axes do not divide is replicated instead, and axes
    of one device are left out. gathered: mesh axes that nothing is cut along any more.
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
            axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
            if shape[i] % math.prod(mesh.shape[axis] for axis in axes):
                axes = ()
        axes = tuple(axis for axis in axes if axis not in gathered)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def named_sharding(
    mesh: jax.sharding.Mesh, logical: Sequence[str | None], shape: Sequence[int] | None = None
) -> NamedSharding:
    """partition_spec on a concrete mesh."""
    return NamedSharding(mesh, partition_spec(logical, shape, mesh))


def constrain(
    x: jax.Array, logical: Sequence[str | None], gathered: Sequence[str] = ()
) -> jax.Array:
    """Pins an array's layout inside jit; gathered as in partition_spec. Without a mesh in context
    it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = partition_spec(logical, x.shape, mesh, gathered)
    return jax.lax.with_sharding_constraint(x, spec)


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def all_gather(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
    """Inside shard_map: the whole of a dim that is cut along mesh axes, a stage for each."""
    for axis in reversed(axes):
        x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
    return x


def reduce_scatter(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
    """Inside shard_map: all_gather's transpose, each device's part of the sum over mesh axes."""
    for axis in axes:
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
    return x


@functools.cache
def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of a Batch's arrays [A, B, ...]: rows over BATCH_AXES, micro-batches one after another."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
