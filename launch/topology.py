"""TPU slices: what a topology or a cloud's name means in chips and hosts, and in each API's words.

Sources of the table, the one place where hardware is named:
GKE      cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (labels, topologies, machine
         types), xpk's core/system_characteristics.py
Cloud    cloud.google.com/tpu/docs/{v5e,v5p,v6e} (accelerator types), .../tpu/docs/runtimes (images)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from posttrain.config import did_you_mean

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# what a cloud name of v5p stands for; other shapes of as many chips exist on GKE alone
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12"),
    *("8x8x8", "8x8x12", "8x8x16", "8x12x16", "8x16x16", "12x16x16", "16x16x16", "16x16x24"),
)


@dataclass(frozen=True)
class Generation:
    """One generation of TPU; `cloud_units` is what its cloud name counts, per chip."""

    name: str
    cloud: str
    cloud_units: int
    gke_accelerator: str
    runtime: str
    topologies: tuple[str, ...]
    max_chips: int


GENERATIONS = {
    "v5e": Generation(
        *("v5e", "v5litepod", 1, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite"), _FLAT, 256
    ),
    "v5p": Generation(*("v5p", "v5p", 2, "tpu-v5p-slice", "v2-alpha-tpuv5"), _CUBES, 6144),
    "v6e": Generation(*("v6e", "v6e", 1, "tpu-v6e-slice", "v2-alpha-tpuv6e"), _FLAT, 256),
}


@dataclass(frozen=True)
class Slice:
    """One slice: its generation, its topology ("16x16"), and how many chips a host holds."""

    generation: Generation
    topology: str
    chips_per_host: int

    @property
    def chips(self) -> int:
        """The product of the topology."""
        return math.prod(map(int, self.topology.split("x")))

    @property
    def hosts(self) -> int:
        """Machines, and so processes, of one slice."""
        return self.chips // self.chips_per_host

    @property
    def cloud_name(self) -> str:
        """The accelerator type, as `v5p-128`. ValueError: the cloud has no name for this shape."""
        if self.topology not in self.generation.topologies:
            raise ValueError(
                f"only GKE makes {self.generation.name} slices of {self.topology}: cloud names "
                f"stand for {', '.join(self.generation.topologies)}"
            )
        if self.topology == "2x4" and self.hosts > 1:
            raise ValueError("only GKE makes a slice of 8 chips on two hosts")
        return f"{self.generation.cloud}-{self.chips * self.generation.cloud_units}"


def _topology_of(generation: Generation, chips: int) -> str | None:
    known = (t for t in generation.topologies if math.prod(map(int, t.split("x"))) == chips)
    return next(known, None)


def _cloud_names(generation: Generation) -> list[str]:
    sizes = [math.prod(map(int, t.split("x"))) for t in generation.topologies]
    return [f"{generation.cloud}-{n * generation.cloud_units}" for n in sizes]


def _by_cloud_name(text: str) -> tuple[Generation, str]:
    every = [name for g in GENERATIONS.values() for name in _cloud_names(g)]
    word, _, number = text.rpartition("-")
    generation = next((g for g in GENERATIONS.values() if g.cloud == word), None)
    if generation is None or not number.isdigit():
        hint = did_you_mean(text.replace("v5e-", "v5litepod-"), every)
        raise ValueError(
            f"no TPU slice is called {text!r}{hint} "
            f"(a topology, as v6e:16x16, or a cloud name, as {every[-1]})"
        )
    units = generation.cloud_units
    topology = None if int(number) % units else _topology_of(generation, int(number) // units)
    if topology is None:
        counts = "TensorCores, two a chip" if units == 2 else "chips"
        raise ValueError(
            f"{word}-{number} does not exist: the number counts {counts}, and there are "
            f"{', '.join(_cloud_names(generation))}"
        )
    return generation, topology


def _by_topology(text: str) -> tuple[Generation, str]:
    word, _, topology = text.partition(":")
    generation = GENERATIONS.get(word)
    if generation is None:
        hint = did_you_mean(word, list(GENERATIONS))
        raise ValueError(f"unknown TPU {word!r}{hint}; known: {', '.join(GENERATIONS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", topology):
        raise ValueError(f"{topology!r} is no topology: write it as {generation.topologies[-1]}")
    sides = [int(side) for side in topology.split("x")]
    known = ", ".join(generation.topologies)
    if generation.topologies is _FLAT:
        if topology not in _FLAT:
            raise ValueError(f"{word} has no slice of {topology}; it has {known}")
    elif len(sides) != 3:
        raise ValueError(f"{word} is a torus of three dimensions, as 4x4x4; found {topology}")
    elif topology not in _CUBES and (any(s % 4 for s in sides) or sides != sorted(sides)):
        raise ValueError(
            f"{word} has no slice of {topology}: from 4x4x4 on each side is a multiple of 4, "
            f"the smallest first; below that there are {', '.join(_CUBES[:4])}"
        )
    elif math.prod(sides) > generation.max_chips:
        raise ValueError(f"a {word} slice has {generation.max_chips} chips at most")
    return generation, topology


def parse(text: str, chips_per_host: int | None = None) -> Slice:
    """`v6e:16x16` or `v5p-128` -> Slice. ValueError says what is wrong and what there is.

    A host holds 4 chips of a slice on several hosts. Slices on one host hold all of theirs; 8 flat
    chips are one machine of 8 or, on GKE alone, two of 4: chips_per_host says which (default 8).
    """
    generation, topology = (_by_topology if ":" in text else _by_cloud_name)(text.strip())
    chips = math.prod(map(int, topology.split("x")))
    usual = chips if chips <= 4 or topology == "2x4" else 4
    allowed = (8, 4) if topology == "2x4" else (usual,)
    if chips_per_host not in (None, *allowed):
        raise ValueError(
            f"a host of {generation.name}:{topology} holds {' or '.join(map(str, allowed))} "
            f"chips, not {chips_per_host}"
        )
    return Slice(generation, topology, chips_per_host or usual)
