"""A mesh laid on a torus: which sides its axes take, and how fast rings over them are.

A mesh axis takes whole sides of the torus where it can, or parts of sides. Collectives go over one
part after the other (weights are gathered in stages, gradients scattered in stages), so that a
part's own links are what counts. Sources: jax's mesh_utils (which axis is laid first), "How to
scale your model" (Austin et al. 2025), chapter 3 (times of collectives over rings).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from posttrain.plan.topology import Slice

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""The mesh's axes as a config says them; the last has the most traffic, and is laid first."""

# TPU7x's two devices of a chip; "six times faster than a 1D ICI link" (docs, tpu7x)
_BETWEEN_CORES = 6

Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]


@dataclass(frozen=True)
class Part:
    """What an axis has of one side: `devices` in a row, and the GB/s into each of them."""

    devices: int
    gbs: float
    side: str


@dataclass(frozen=True)
class Network:
    """Of each axis its parts, the outermost first."""

    parts: Mapping[str, tuple[Part, ...]]

    def said(self, axis: str) -> str:
        """`16 (x ring) x 16 (y ring)`, or "" for an axis of one device."""
        return " x ".join(f"{part.devices} ({part.side})" for part in self.parts[axis])

    def seconds(self, kind: Kind, axis: str, size: float) -> float:
        """At least, for an array of `size` bytes: the gathered one, or the one that is summed.

        A ring of n devices takes in (n - 1) / n of the array; gathered in stages, the innermost
        part first, an inner stage has only what the outer ones leave of it. A reduce-scatter is the
        same in the other order, an all-reduce both.
        """
        total, outer = 0.0, 1
        for part in self.parts[axis]:
            total += size / outer * (1 - 1 / part.devices) / (part.gbs * 1e9)
            outer *= part.devices
        return total * (2 if kind == "all-reduce" else 1)


def wire_bytes(kind: Kind, devices: int, size: float) -> float:
    """Into each device, for an array of `size` bytes over so many devices."""
    return size * (1 - 1 / devices) * (2 if kind == "all-reduce" else 1)


def lay(sizes: Mapping[str, int], one: Slice) -> Network:
    """The mesh on the slices. Sizes of AXES, whose product is all devices.

    ValueError where that is not so, or where several slices do not divide the data axis.
    """
    if math.prod(sizes.values()) != one.devices:
        said = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES)
        raise ValueError(f"{said} is not the {one.devices} devices of {one.name}")
    if sizes["data"] % one.slices:
        raise ValueError(
            f"{one.slices} slices are joined by the data axis: mesh.data={sizes['data']} is no "
            f"multiple of {one.slices}"
        )
    chip = one.chip
    link = chip.link_gbs / chip.devices  # the devices of a chip share its links
    free = dict(zip("xyz", one.sides, strict=False))
    whole = dict(zip("xyz", one.rings, strict=False))
    if chip.devices > 1:
        free["core"] = chip.devices
    left = {**sizes, "data": sizes["data"] // one.slices}
    parts: dict[str, tuple[Part, ...]] = {}
    for axis in reversed(AXES):
        parts[axis] = _take(
            left[axis], free, whole, dict(zip("xyz", one.sides, strict=False)), link
        )
    if one.slices > 1:
        between = Part(one.slices, chip.dcn_gbs / chip.devices, "slices")
        parts["data"] = (between, *parts["data"])
    return Network(parts)


def _take(
    size: int,
    free: dict[str, int],
    rings: Mapping[str, bool],
    sides: Mapping[str, int],
    link: float,
) -> tuple[Part, ...]:
    """The parts of an axis of `size` devices, taken from what is free, which loses them.

    Whole free sides first, the longest; then what divides of the others.
    """
    taken: list[Part] = []
    for wholly in (True, False):
        for name in sorted(free, key=lambda name: -free[name]):
            here = free[name] if wholly else math.gcd(size, free[name])
            if here == 1 or size % here:
                continue
            free[name] //= here
            size //= here
            if name == "core":
                taken.append(Part(here, link * _BETWEEN_CORES, "cores of a chip"))
                continue
            # Further out on a side devices are apart, and groups between them share its links.
            apart = sides[name] // (here * free[name])
            closed = rings[name] and here * apart == sides[name]
            rate = link * (2 if closed else 1) / apart
            taken.append(Part(here, rate, f"{name} {'ring' if closed else 'line'}"))
    assert size == 1, "the sizes' product is all devices"
    return tuple(taken)
