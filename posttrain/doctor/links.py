"""Between devices, and between a device and its host: right to the bit, and how fast.

Speeds of collectives are of the bus: what each device must send, over the time. With n devices
along the axis and S bytes in the whole array that is (n-1)/n S for all-gather and reduce-scatter,
twice that for all-reduce, S for ppermute (a ring), as NCCL's tests count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from posttrain.doctor.base import (
    Finding,
    Findings,
    Level,
    Subject,
    duration,
    median_seconds,
    rate,
    size,
)
from posttrain.sharding import make_mesh

_TIMES = 5  # each process must make as many calls


@dataclass(frozen=True)
class Collective:
    """One of them: on a device's array [m] along an axis of n, and in numpy on all of them [n, m].

    sent: bytes each device sends, per byte of its input.
    """

    run: Callable[[jax.Array, str, int], jax.Array]
    definition: Callable[[np.ndarray], np.ndarray]
    sent: Callable[[int], float]


def _ring(x: jax.Array, axis: str, n: int) -> jax.Array:
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


COLLECTIVES = {
    "all-gather": Collective(
        lambda x, axis, n: jax.lax.all_gather(x, axis, tiled=True),
        lambda x: np.tile(x.reshape(-1), (len(x), 1)),
        lambda n: n - 1,
    ),
    "reduce-scatter": Collective(
        lambda x, axis, n: jax.lax.psum_scatter(x, axis, tiled=True),
        lambda x: x.sum(0).reshape(len(x), -1),
        lambda n: (n - 1) / n,
    ),
    "all-reduce": Collective(
        lambda x, axis, n: jax.lax.psum(x, axis),
        lambda x: np.tile(x.sum(0), (len(x), 1)),
        lambda n: 2 * (n - 1) / n,
    ),
    "ppermute": Collective(_ring, lambda x: np.roll(x, 1, axis=0), lambda n: 1),
}


def collectives(on: Subject) -> Findings:
    """all-gather, reduce-scatter, all-reduce, ppermute over each axis of the mesh"""
    platform = on.local_devices()[0].platform
    mesh = make_mesh(on.mesh)
    axes = [axis for axis, n in mesh.shape.items() if n > 1]
    if not axes:
        yield Finding("collectives", "one device: there is nobody to talk to")
    n_bytes = (4 << 20) if platform == "cpu" else (256 << 20)
    for axis in axes:
        for name, collective in COLLECTIVES.items():
            yield _one(mesh, axis, name, collective, n_bytes)


def _program(mesh: Any, axis: str, collective: Collective) -> Callable[[Any], jax.Array]:
    """Global [devices * m] -> global [devices * k], each device's result in its own place."""
    everywhere = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(
        lambda x: collective.run(x, axis, mesh.shape[axis]),
        mesh=mesh,
        in_specs=everywhere,
        out_specs=everywhere,
        check_vma=False,
    )
    return jax.jit(mapped)


def _expected(mesh: Any, axis: str, collective: Collective, values: np.ndarray) -> np.ndarray:
    """[devices, m] -> [devices, k], devices in the mesh's order."""
    at = mesh.axis_names.index(axis)
    grid = np.moveaxis(values.reshape(*mesh.devices.shape, -1), at, 0)
    n, *others, m = grid.shape
    lines = grid.reshape(n, -1, m)
    done = np.stack([collective.definition(lines[:, i]) for i in range(lines.shape[1])], 1)
    return np.moveaxis(done.reshape(n, *others, -1), 0, at).reshape(len(values), -1)


def _one(mesh: Any, axis: str, name: str, collective: Collective, n_bytes: int) -> Finding:
    n, everywhere = mesh.shape[axis], NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    program = _program(mesh, axis, collective)
    # whole numbers, so small that their sum is exact in float32 in any order
    m = 16 * n
    values = (np.arange(mesh.size * m, dtype=np.float32) * 31 % 251).reshape(mesh.size, m)
    whole = jax.make_array_from_callback(
        (values.size,), everywhere, lambda index: values.reshape(-1)[index]
    )
    wanted = _expected(mesh, axis, collective, values)
    wrong = []
    for shard in program(whole).addressable_shards:
        place = (shard.index[0].start or 0) // wanted.shape[1]
        if not np.array_equal(np.asarray(shard.data), wanted[place]):
            wrong.append(str(shard.device))
    what = f"{name} over {axis} ({n})"
    if wrong:
        todo = (
            "nothing trained on this mesh can be trusted: look at the links and the driver's log, "
            "and try the devices by halves to find the broken one"
        )
        return Finding(what, f"wrong on {', '.join(wrong)}", Level.WRONG, todo)
    # all-gather makes n times its input, so that the larger side has n_bytes in each
    length = n_bytes // 4 // (n if name == "all-gather" else 1) // n * n
    large = jax.jit(lambda: jnp.ones(mesh.size * length, jnp.float32), out_shardings=everywhere)()
    seconds = median_seconds(lambda: program(large), times=_TIMES)
    sent = length * 4 * collective.sent(n)
    return Finding(
        what,
        f"right; {rate(sent, seconds)} sent by each device ({size(n_bytes)}, {duration(seconds)})",
        figures={"sent_bytes": sent, "seconds": seconds, "array_bytes": n_bytes},
    )


def transfer(on: Subject) -> Findings:
    """host to device and back, and the time to start a program"""
    device = on.local_devices()[0]
    n_bytes = (16 << 20) if device.platform == "cpu" else (256 << 20)
    data = np.random.default_rng(0).integers(0, 256, n_bytes, np.uint8).view(np.uint32)
    there = jax.device_put(data, device)
    if not np.array_equal(np.asarray(there), data):
        todo = "do not train on this device: its memory or its link is broken"
        yield Finding("round trip", "other bytes came back", Level.WRONG, todo)
        return
    seconds = median_seconds(lambda: jax.device_put(data, device))
    shared = " (a copy in the host's memory)" if device.platform == "cpu" else ""
    yield Finding(
        "host to device",
        f"{rate(n_bytes, seconds)} ({size(n_bytes)}){shared}",
        figures={"bytes": n_bytes, "seconds": seconds},
    )
    add = jax.jit(lambda x: x + jnp.uint32(1))
    if device.platform == "cpu":
        yield Finding("device to host", "the same memory, nothing is copied")
    else:
        # a fresh array each time: an array keeps the copy that the host once took of it
        fresh = iter([jax.block_until_ready(add(there)) for _ in range(5)])
        seconds = median_seconds(lambda: np.asarray(next(fresh)), times=3)
        yield Finding(
            "device to host",
            f"{rate(n_bytes, seconds)} ({size(n_bytes)})",
            figures={"bytes": n_bytes, "seconds": seconds},
        )
    one = jax.device_put(np.zeros(8, np.uint32), device)
    seconds = median_seconds(lambda: add(one), times=30)
    yield Finding(
        "starting a program",
        f"{duration(seconds)}, from the call to its result",
        figures={"seconds": seconds},
    )
