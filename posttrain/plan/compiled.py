"""A program compiled for devices that need not be here, and what its text says of a run of it.

Every time below is a model: what a chip's makers state and what the compiler reckons. No program
ran.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from posttrain.models.spec import Spec
from posttrain.plan import collectives, hlo
from posttrain.plan.chips import GIB
from posttrain.plan.collectives import Collective, Mesh
from posttrain.plan.devices import places
from posttrain.plan.overflow import Overflow, is_overflow, read_overflow
from posttrain.plan.programs import Program
from posttrain.plan.topology import Slice
from posttrain.plan.work import Counter, Work


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. held: what stays between runs, by its name (parameters, optimiser,
    ...). gradients: of what is trained, in float32, of which a run holds all at its end.
    temporaries: all that a run needs beside its arguments, gradients too. peak: the most that is
    alive at once, arguments included, by the compiler's own count. limit: what there is; None: not
    known."""

    held: Mapping[str, float]
    gradients: float
    temporaries: float
    peak: float
    limit: float | None

    @property
    def activations(self) -> float:
        """The most of the temporaries that is no gradient: activations, gathered weights."""
        return max(self.peak - sum(self.held.values()) - self.gradients, 0.0)


@dataclass(frozen=True)
class Times:
    """Seconds of a run at the least, one device: by arithmetic, by HBM, by the network. Of what
    cannot be said (no slice of a TPU) 0."""

    compute: float
    hbm: float
    network: float

    @property
    def binds(self) -> str:
        """What sets the floor."""
        named = {"compute": self.compute, "HBM": self.hbm, "interconnect": self.network}
        return max(named, key=lambda name: named[name])

    @property
    def least(self) -> float:
        """Where all of it overlaps."""
        return max(self.compute, self.hbm, self.network)

    @property
    def serial(self) -> float:
        """Where nothing does."""
        return self.compute + self.hbm + self.network


@dataclass(frozen=True)
class Compiled:
    """A program that fits. flops, hbm_bytes: of a run on one device; kernels: FLOPs in kernels'
    calls; dynamic: those in loops whose turns are a bound; estimated: those of which the compiler
    says how many cycles they take, and cycles: how many that are. needed: FLOPs by
    train/throughput.py's convention, a device's share."""

    name: str
    memory: Memory
    flops: float
    kernels: float
    dynamic: float
    hbm_bytes: float
    cycles: float
    estimated: float
    needed: float | None
    tokens: int
    collectives: tuple[Collective, ...]
    times: Times
    seconds: float  # that compiling took
    host_gib: float  # memory of this process at its fullest


def compile_program(
    program: Program, mesh: jax.sharding.Mesh, spec: Spec, one: Slice | None
) -> Compiled | Overflow:
    """Compiles it for the mesh's devices, and reads what it is. one: the slice they are of."""
    limit = one.chip.hbm_gib * GIB if one else None
    held = {name: bytes_of(tree) for name, tree in program.held.items()}
    platform = mesh.devices.flat[0].platform
    began = time.monotonic()
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.arguments, **program.keywords)
        lowered = traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not is_overflow(error):
                raise
            return read_overflow(error, program.name, held, limit)
    seconds = time.monotonic() - began
    stats: Any = compiled.memory_analysis()
    arguments = stats.argument_size_in_bytes
    beside = stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    elsewhere = sum(held[name] for name in program.beside)
    # of a CPU's program XLA's own peak leaves the temporaries out
    peak = stats.peak_memory_in_bytes if platform == "tpu" else arguments + beside
    trained = program.trained if program.trained is not None else {}
    memory = Memory(
        held=held,
        gradients=sum(4.0 * local_size(x) for x in jax.tree.leaves(trained)),
        temporaries=float(stats.temp_size_in_bytes),
        peak=float(peak + elsewhere),
        limit=limit,
    )
    if limit and memory.peak > limit:  # by what the compiler knows nothing of
        return Overflow(program.name, memory.peak, limit, held)
    windows = [kind.window for kind in spec.kinds]
    return read_text(compiled.as_text(), program, memory, mesh, one, windows, seconds)


def read_text(
    text: str,
    program: Program,
    memory: Memory,
    mesh: jax.sharding.Mesh,
    one: Slice | None,
    windows: list[int | None],
    seconds: float,
) -> Compiled:
    """What a program's text says of a run."""
    module = hlo.parse(text)
    counter = Counter(module, windows)

    def work(visit: hlo.Visit) -> Work:
        return counter.work(visit.computation, visit.instruction)

    visits = list(hlo.walk(module, program.bounds, lambda visit: work(visit).flops))
    works = [(visit, work(visit)) for visit in visits]
    flops = sum(visit.times * each.flops for visit, each in works)
    moved = sum(visit.times * each.hbm_bytes for visit, each in works)
    where = Mesh(
        tuple(mesh.axis_names), np.argwhere(np.ones(mesh.devices.shape)), places(_flat(mesh))
    )
    weights = {"head": program.held.get("parameters"), "embedding": program.held.get("parameters")}
    names = {
        tuple(tree[name].shape): name for name, tree in weights.items() if tree and name in tree
    }
    found = collectives.find(module, visits, where, names)
    return Compiled(
        name=program.name,
        memory=memory,
        flops=flops,
        kernels=sum(visit.times * each.flops for visit, each in works if each.kernel),
        dynamic=sum(visit.times * each.flops for visit, each in works if visit.dynamic),
        hbm_bytes=moved,
        cycles=sum(visit.times * each.cycles for visit, each in works),
        estimated=sum(visit.times * each.estimated for visit, each in works),
        needed=None if program.flops is None else program.flops / mesh.devices.size,
        tokens=program.tokens,
        collectives=tuple(found),
        times=_times(flops, moved, found, one),
        seconds=seconds,
        host_gib=_peak_rss(),
    )


def _flat(mesh: jax.sharding.Mesh) -> list[Any]:
    return list(mesh.devices.flat)


def _times(flops: float, moved: float, found: list[Collective], one: Slice | None) -> Times:
    if one is None:
        return Times(0.0, 0.0, 0.0)
    chip = one.chip
    network = sum(each.total / collectives.rate(each, one) for each in found)
    return Times(
        flops / (chip.tflops * 1e12 / chip.devices),
        moved / (chip.hbm_gbs * 1e9 / chip.devices),
        network,
    )


def local_size(leaf: Any) -> int:
    """Elements of it on one device."""
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64))


def bytes_of(tree: Any) -> float:
    """Of a tree of abstract arrays, on one device."""
    return float(sum(local_size(x) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _peak_rss() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def as_json(one: Compiled | Overflow) -> dict[str, Any]:
    """As plain values: bytes, FLOPs and seconds of one device."""
    return {"fits": isinstance(one, Compiled), **dataclasses.asdict(one)}


def from_json(tree: Mapping[str, Any]) -> Compiled | Overflow:
    """The same back."""
    given = {key: value for key, value in tree.items() if key != "fits"}
    if not tree["fits"]:
        return Overflow(**given)
    given["memory"] = Memory(**given["memory"])
    given["times"] = Times(**given["times"])
    given["collectives"] = tuple(
        Collective(**{**each, "axes": tuple(each["axes"]), "sides": tuple(each["sides"])})
        for each in given["collectives"]
    )
    return Compiled(**given)
