"""Slices of TPU: what a topology or a cloud's name means in chips, hosts and links.

v6e:16x16        a topology: the sides of the torus
v5p-128          the cloud's name: of v5p it counts TensorCores, so this is 64 chips, 4x4x4
2xv6e:16x16      two such slices, joined by the data centre's network
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from posttrain.config import did_you_mean
from posttrain.plan.chips import CHIPS, Chip

# what people call them elsewhere
_NICKNAMES = {"v5lite": "v5e", "v5litepod": "v5e", "trillium": "v6e", "ironwood": "tpu7x"}
_NICKNAMES |= {"v7x": "tpu7x", "v7": "tpu7x", "v5": "v5p", "v6": "v6e"}


def _sides(topology: str) -> tuple[int, ...]:
    return tuple(map(int, topology.split("x")))


@dataclass(frozen=True)
class Slice:
    """One slice, or several of a kind: topology "16x16", and how many chips a host holds.

    `chips`, `hosts` and `cloud_name` are of one slice.
    """

    chip: Chip
    topology: str
    chips_per_host: int
    slices: int = 1

    @property
    def name(self) -> str:
        """As `parse` reads it: v6e:16x16."""
        times = f"{self.slices}x" if self.slices > 1 else ""
        return f"{times}{self.chip.name}:{self.topology}"

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the torus, in chips."""
        return _sides(self.topology)

    @property
    def rings(self) -> tuple[bool, ...]:
        """Of each side, whether its ends are joined."""
        return tuple(side % self.chip.wrapped == 0 for side in self.sides)

    @property
    def chips(self) -> int:
        """The product of the topology."""
        return math.prod(self.sides)

    @property
    def devices(self) -> int:
        """JAX devices of all slices together."""
        return self.chips * self.chip.devices * self.slices

    @property
    def hosts(self) -> int:
        """Machines, and so processes, of one slice."""
        return self.chips // self.chips_per_host

    @property
    def cloud_name(self) -> str:
        """The accelerator type, as `v5p-128`. ValueError: the cloud has no name for this shape."""
        if self.topology not in self.chip.topologies:
            raise ValueError(
                f"only GKE makes {self.chip.name} slices of {self.topology}: cloud names "
                f"stand for {', '.join(self.chip.topologies)}"
            )
        if self.topology == "2x4" and self.hosts > 1:
            raise ValueError("only GKE makes a slice of 8 chips on two hosts")
        return f"{self.chip.cloud}-{self.chips * self.chip.cloud_units}"

    @property
    def described(self) -> dict[str, Any]:
        """What jax.experimental.topologies.get_topology_desc takes, beside its platform."""
        said: dict[str, Any] = {"topology_name": f"{self.chip.name}:{self.topology}"}
        if self.chips == 1:
            said["chips_per_host_bounds"] = (1, 1, 1)
        if self.chip.config:
            said["chip_config_name"] = self.chip.config
        if self.slices > 1:
            said["num_slices"] = self.slices
        return said


def sizes(chip: Chip) -> list[Slice]:
    """The slices of a generation that the cloud has a name for, the smallest first."""
    every = [_slice(chip, topology) for topology in chip.topologies]
    return sorted(every, key=lambda one: one.chips)


def _cloud_names(chip: Chip) -> list[str]:
    return [f"{chip.cloud}-{one.chips * chip.cloud_units}" for one in sizes(chip)]


def _by_cloud_name(text: str) -> tuple[Chip, str]:
    every = [name for chip in CHIPS.values() for name in _cloud_names(chip)]
    word, _, number = text.rpartition("-")
    chip = next((chip for chip in CHIPS.values() if chip.cloud == word), None)
    if chip is None or not number.isdigit():
        meant = _NICKNAMES.get(word.lower(), word if word in CHIPS else "")
        guess = f"{CHIPS[meant].cloud}-{number}" if meant else text
        hint = f"; did you mean {guess!r}" if guess in every else did_you_mean(text, every)
        raise ValueError(
            f"no TPU slice is called {text!r}{hint} "
            f"(a topology, as v6e:16x16, or a cloud name, as v6e-256)"
        )
    units = chip.cloud_units
    of_chips = {one.chips * units: one.topology for one in reversed(sizes(chip))}
    if int(number) not in of_chips:
        counts = "TensorCores, two a chip" if units == 2 else "chips"
        raise ValueError(
            f"{word}-{number} does not exist: the number counts {counts}, and there are "
            f"{', '.join(_cloud_names(chip))}"
        )
    return chip, of_chips[int(number)]


def _by_topology(text: str) -> tuple[Chip, str]:
    word, _, topology = text.partition(":")
    chip = CHIPS.get(word)
    if chip is None:
        meant = _NICKNAMES.get(word.lower())
        hint = f"; did you mean {meant!r}" if meant else did_you_mean(word, list(CHIPS))
        raise ValueError(f"unknown TPU {word!r}{hint}; known: {', '.join(CHIPS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", topology):
        raise ValueError(f"{topology!r} is no topology: write it as {chip.topologies[-1]}")
    sides, known = _sides(topology), chip.topologies
    if chip.axes == 2:
        if topology not in known:
            raise ValueError(f"{word} has no slice of {topology}; it has {', '.join(known)}")
    elif len(sides) != 3:
        raise ValueError(f"{word} is a torus of three dimensions, as 4x4x4; found {topology}")
    elif topology not in known and (any(s % 4 for s in sides) or list(sides) != sorted(sides)):
        raise ValueError(
            f"{word} has no slice of {topology}: from 4x4x4 on each side is a multiple of 4, "
            f"the smallest first; below that there are {', '.join(known[:4])}"
        )
    elif math.prod(sides) > chip.max_chips:
        raise ValueError(f"a {word} slice has {chip.max_chips} chips at most")
    return chip, topology


def _slice(chip: Chip, topology: str, chips_per_host: int | None = None) -> Slice:
    chips = math.prod(_sides(topology))
    usual = chips if chips <= 4 or topology == "2x4" else 4
    allowed = (8, 4) if topology == "2x4" else (usual,)
    if chips_per_host not in (None, *allowed):
        raise ValueError(
            f"a host of {chip.name}:{topology} holds {' or '.join(map(str, allowed))} "
            f"chips, not {chips_per_host}"
        )
    return Slice(chip, topology, chips_per_host or usual)


def parse(text: str, chips_per_host: int | None = None) -> Slice:
    """`v6e:16x16`, `v5p-128` or `2xv6e:16x16` -> Slice. ValueError says what is wrong.

    A host holds 4 chips of a slice on several hosts. Slices on one host hold all of theirs; 8 flat
    chips are one machine of 8 or, on GKE alone, two of 4: chips_per_host says which (default 8).
    """
    text = text.strip()
    times = re.match(r"([1-9]\d*)x(?=[a-z])", text)
    one = text[times.end() :] if times else text
    chip, topology = (_by_topology if ":" in one else _by_cloud_name)(one)
    found = _slice(chip, topology, chips_per_host)
    return dataclasses.replace(found, slices=int(times[1])) if times else found
