"""The collectives of a compiled program: kind, bytes on the wire, weight, mesh axes, torus axes.

Bytes are what a device sends, by the way that needs the fewest: (n - 1) / n of the whole array for
an all-gather or a reduce-scatter over n devices, twice that for an all-reduce, what a device holds
for a permute. A collective that overlaps with other work stands in the text at its start, its end
and in fusions between, under one channel and chain id: it is counted once. (The channel alone will
not do: all collectives of shard_map have the first.)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from posttrain.plan import hlo
from posttrain.plan.hlo import Instruction, Module, Visit
from posttrain.plan.topology import Slice

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_OP = re.compile(rf"({'|'.join(KINDS)})(-start)?$")
_SCATTERED = "all-reduce-scatter"
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
# what scopes of the model's operations are called by
_WEIGHTS = ["q", "k", "v", "o", "gate", "up", "down", "router", "embedding", "head", "score"]
SIDES = ("x", "y", "z", "slices")
"""Of the torus, and beyond it."""
_GRADIENT = re.compile(r"transpose\(")


@dataclass(frozen=True)
class Mesh:
    """Which device is which: a program numbers them in the mesh's order.

    coordinates: where each lies in the mesh's axes. places: where in the torus; None: in none.
    """

    axes: tuple[str, ...]
    coordinates: np.ndarray  # [devices, axes]
    places: np.ndarray | None  # [devices, sides]


@dataclass(frozen=True)
class Collective:
    """All runs of one collective in a step."""

    kind: str
    weight: str  # "" where the program does not say
    backward: bool
    axes: tuple[str, ...]  # of the mesh
    sides: tuple[str, ...]  # of the torus, along which its groups stretch
    size: int  # devices of a group
    times: int
    wire_bytes: float  # a device and a run
    overlaps: bool  # other work goes on meanwhile

    @property
    def total(self) -> float:
        """Bytes a device sends for it in a step."""
        return self.times * self.wire_bytes


def find(
    module: Module,
    visits: Sequence[Visit],
    mesh: Mesh,
    names: Mapping[tuple[int, ...], str] = MappingProxyType({}),
) -> list[Collective]:
    """Those that move anything, the largest first.

    names: of weights by their whole shapes, for collectives that bear none.
    """
    seen: dict[object, tuple[int, Instruction, bool]] = {}
    for visit in visits:
        fused = visit.instruction.op == "fusion"
        for one, split in _ops(module, visit):
            ids = [one.attribute(rf'{name}="?(\d+)') for name in ("channel_id", "chain_id")]
            key = (one.op, *ids, one.op_name, one.shapes[0].dims) if fused else id(one)
            times, known, overlaps = seen.get(key, (0, one, False))
            if visit.times > times:
                times, known = visit.times, one
            seen[key] = (times, known, overlaps or split)
    found = [_collective(one, times, split, mesh, names) for times, one, split in seen.values()]
    return sorted((c for c in found if c.wire_bytes), key=lambda c: -c.total)


def _ops(module: Module, visit: Visit) -> Iterator[tuple[Instruction, bool]]:
    """The collectives of an instruction; with whether they are apart from their end."""
    one = visit.instruction
    if _OP.match(one.op):
        yield one, one.op.endswith("-start")
    for where, inner in hlo.inside(module, one):
        if _OP.match(inner.op):
            targets = [x.attributes for x in where.by_name.values() if x.op == "custom-call"]
            if where.name.startswith("all-reduce-scatter"):  # what a TPU's reduce-scatter is
                inner = dataclasses.replace(inner, op=_SCATTERED)
            yield inner, any("AsyncCollective" in text for text in targets)


def rate(one: Collective, of: Slice) -> float:
    """Bytes a second into a device, at the most: over all links of the sides that it stretches
    along, both ways where a side is a ring; between slices, over the network there."""
    chip = of.chip
    if "slices" in one.sides:
        return chip.dcn_gbs * 1e9 / chip.devices
    rings = dict(zip("xyz", of.rings, strict=False))
    links = sum(2 if rings.get(side) else 1 for side in one.sides)
    return max(links, 1) * chip.link_gbs * 1e9 / chip.devices


def _collective(
    one: Instruction,
    times: int,
    overlaps: bool,
    mesh: Mesh,
    names: Mapping[tuple[int, ...], str],
) -> Collective:
    match = _OP.match(one.op)
    kind, start = (match[1], match[2]) if match else ("reduce-scatter", None)
    members = groups(one, len(mesh.coordinates))
    size = len(members[0])
    arrays = one.shapes
    if start and kind in ("all-gather", "collective-permute"):
        arrays = (max(arrays, key=lambda shape: shape.bytes),)  # its result holds the operand too
    whole = sum(shape.bytes for shape in arrays)
    sent = {
        "all-gather": whole * (size - 1) / size,
        "all-reduce": 2 * whole * (size - 1) / size,
        # the shape is a part's, but of an all-reduce whose result is cut
        "reduce-scatter": whole * (size - 1) / (size if one.op == _SCATTERED else 1),
        "all-to-all": whole * (size - 1) / size,
    }.get(kind, whole)
    return Collective(
        kind=kind,
        weight=weight_of(one.op_name) or _by_shape(one, size, names),
        backward=bool(_GRADIENT.search(one.op_name)) and not is_again(one.op_name),
        axes=_spanned(members, mesh.coordinates, mesh.axes),
        sides=_spanned(members, mesh.places, SIDES) if mesh.places is not None else (),
        size=size,
        times=times,
        wire_bytes=float(sent) if size > 1 else 0.0,
        overlaps=overlaps,
    )


def _by_shape(one: Instruction, size: int, names: Mapping[tuple[int, ...], str]) -> str:
    """By what is gathered or summed, as a whole."""
    dims = list(one.shapes[0].dims)
    if one.op.startswith("reduce-scatter") and (at := one.attribute(r"dimensions=\{(\d+)\}")):
        dims[int(at)] *= size
    return names.get(tuple(dims), "")


def is_again(op_name: str) -> bool:
    """Whether it is part of the forward pass that is made again for the backward pass."""
    return "rematted_computation" in op_name


def weight_of(op_name: str) -> str:
    """The weight whose scope an operation bears (models/layers.py); "": none."""
    words = re.findall(r"\w+", op_name)
    return next((word for word in reversed(words) if word in _WEIGHTS), "")


def _spanned(
    members: Sequence[Sequence[int]], at: np.ndarray | None, names: Sequence[str]
) -> tuple[str, ...]:
    """The axes along which a group's devices differ."""
    assert at is not None
    differs = np.zeros(at.shape[1], bool)
    for group in members[:64]:
        here = at[list(group)]
        differs |= (here != here[0]).any(0)
    return tuple(name for name, one in zip(names, differs.tolist(), strict=False) if one)


def groups(one: Instruction, devices: int) -> list[list[int]]:
    """The devices that meet, from any of the ways in which XLA writes them."""
    text = one.attributes
    if found := re.search(r"source_target_pairs=\{\{([\d,{}]*)\}\}", text):
        pairs = [_numbers(pair) for pair in found[1].split("},{")]
        return [pair for pair in pairs if pair[0] != pair[1]] or [[0]]
    if found := re.search(r"replica_groups=\{\{([\d,{}]*)\}\}", text):
        return [_numbers(group) for group in found[1].split("},{")]
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", text):
        return _iota(found[2], found[3]).reshape(_numbers(found[1])).tolist()
    order = rf"(?:, device_ids=\({_IOTA}\))?"
    found = re.search(rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}]*)\}}", text)
    if found is None:  # an empty list: all of them
        return [list(range(devices))]
    axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    sizes = [int(size) for size in axes.values()]
    ids = _iota(found[2] or str(int(np.prod(sizes))), found[3]).reshape(sizes)
    named = [list(axes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
    ids = np.moveaxis(ids, named, range(-len(named), 0))
    return ids.reshape(-1, int(np.prod([sizes[i] for i in named]))).tolist()


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids
