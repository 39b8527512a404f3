"""The best layout of a training step on a slice: mesh x remat x micro-batches x chunk of the head.

All layouts are ranked by the analytic model (analytic.py, floors.py); the best few are compiled,
and the model's error against them is shown; the winner, which is the best of those that compiled
and fit, becomes an overlay: a config file to lay over the job's.

Left out: remat `offload`, whose traffic to the host is in no formula here, and `dots_batch`, which
keeps what `dots` keeps where attention is a kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.models.spec import RematName
from posttrain.plan.analytic import Memory, Sizes, Step, memory
from posttrain.plan.chips import GIB
from posttrain.plan.floors import Floors, floors
from posttrain.plan.network import AXES
from posttrain.plan.topology import Slice, sizes

REMATS: tuple[RematName, ...] = ("none", "dots", "attention", "full")
CHUNKS = (256, 1024)
COMPILED = 3
ATTEMPTS = 9
"""Compilations at the most: a program that does not fit is refused within seconds."""


@dataclass(frozen=True)
class Layout:
    """One way to compute the step, and what the analytic model says of it."""

    one: Slice
    sizes: Sizes
    step: Step
    memory: Memory

    @functools.cached_property
    def floors(self) -> Floors:
        """Of the step's time."""
        return floors(self.step, self.sizes, self.one)

    @property
    def seconds(self) -> float:
        """What layouts are ranked by: half-way between all overlapped and nothing overlapped."""
        return (self.floors.seconds + self.floors.serial) / 2

    @property
    def mesh(self) -> str:
        """`fsdp=64 tensor=4`, without axes of one device."""
        found = [f"{axis}={self.sizes[axis]}" for axis in AXES if self.sizes[axis] > 1]
        return " ".join(found) or "one device"

    @property
    def said(self) -> str:
        """On one line."""
        step = self.step
        return (
            f"{self.mesh}, remat {step.remat}, {step.accumulate} micro-batch(es), head_chunk "
            f"{step.head_chunk}"
        )

    @property
    def overrides(self) -> list[str]:
        """As key.path=value of the command line."""
        keys = {f"mesh.{axis}": self.sizes[axis] for axis in AXES}
        keys["mesh.fsdp_inner"] = 0  # by the slice, whatever the config says
        keys |= {"model.remat": self.step.remat, "batch.accumulate": self.step.accumulate}
        keys |= {"train.head_chunk": self.step.head_chunk} if self.step.spec.head == "lm" else {}
        return [f"{key}={value}" for key, value in keys.items()]


@dataclass(frozen=True)
class Found:
    """All layouts of a step on a slice: those that fit, the fastest first, and why others do not.

    refused: reason -> how many layouts have it.
    """

    fits: tuple[Layout, ...]
    too_large: tuple[Layout, ...]
    refused: dict[str, int]


def meshes(one: Slice, experts: int) -> Iterator[dict[str, int]]:
    """Sizes of the axes whose product is the devices of the slices; the expert axis only where
    there are experts."""
    divisors = [n for n in range(1, one.devices + 1) if one.devices % n == 0]
    of_axis = {axis: divisors if axis != "expert" or experts else [1] for axis in AXES[1:]}
    for chosen in itertools.product(*of_axis.values()):
        inner = dict(zip(of_axis, chosen, strict=True))
        used = inner["fsdp"] * inner["expert"] * inner["context"] * inner["tensor"]
        if one.devices % used == 0:
            yield {"data": one.devices // used, **inner}


def explore(step: Step, one: Slice) -> Found:
    """Every layout of the step on these slices."""
    fits: list[Layout] = []
    too_large: list[Layout] = []
    refused: dict[str, int] = {}
    experts = max(kind.experts for kind in step.spec.kinds)
    splits = [n for n in range(1, step.rows + 1) if step.rows % (n * step.together) == 0]
    room = one.chip.hbm_gib * GIB
    chunks = sorted({*CHUNKS, step.head_chunk}, reverse=True)
    chunks = chunks if step.spec.head == "lm" else [step.head_chunk]
    for mesh, accumulate in itertools.product(list(meshes(one, experts)), splits):
        tried = dataclasses.replace(step, accumulate=accumulate)
        wrong = tried.refusals(mesh)
        if mesh["data"] % one.slices:
            wrong.append(f"data={mesh['data']} does not divide over {one.slices} slices")
        for reason in wrong:
            refused[reason] = refused.get(reason, 0) + 1
        if wrong:
            continue
        for remat in REMATS:
            # The head reads its kernel once a chunk: the longest chunk for which there is room.
            for chunk in chunks:
                tried = dataclasses.replace(tried, remat=remat, head_chunk=chunk)
                needs = memory(tried, mesh)
                if needs.total <= room:
                    break
            found = Layout(one, mesh, tried, needs)
            (fits if needs.total <= room else too_large).append(found)
    fits.sort(key=lambda layout: (layout.seconds, layout.memory.total))
    too_large.sort(key=lambda layout: layout.memory.total)
    return Found(tuple(fits), tuple(too_large), refused)


@dataclass(frozen=True)
class Result:
    """What a compiled program says of a layout, of one device. None: the compiler said nothing."""

    fits: bool
    peak: float | None
    """Bytes at its fullest."""
    flops: float | None
    wire: Mapping[str, float] | None
    """Kind of collective -> bytes into it over the network."""
    floors: tuple[float, float, float] | None
    """Seconds of arithmetic, of HBM, of the network."""
    message: str = ""
    """Why it does not fit."""

    @property
    def seconds(self) -> float | None:
        """As Layout's."""
        return None if self.floors is None else (max(self.floors) + sum(self.floors)) / 2


Compile = Callable[[Layout], Result]


@dataclass(frozen=True)
class Outcome:
    """What a search found: the layouts that were compiled, and the best of them that fits."""

    found: Found
    tried: tuple[tuple[Layout, Result], ...]
    winner: Layout | None


def search(step: Step, one: Slice, compile: Compile, *, count: int = COMPILED) -> Outcome:
    """The best layout. `compile` compiles one for the slice: the best, until `count` of them fit by
    what it says, or ATTEMPTS are made."""
    found = explore(step, one)
    tried: list[tuple[Layout, Result]] = []
    for layout in found.fits[:ATTEMPTS]:
        if sum(result.fits for _, result in tried) == count:
            break
        tried.append((layout, compile(layout)))
    sound = [(layout, result) for layout, result in tried if result.fits]
    best = min(sound, key=lambda pair: pair[1].seconds or pair[0].seconds, default=None)
    return Outcome(found, tuple(tried), best[0] if best else None)


def smallest(
    step: Step, like: Slice, compile: Callable[[Slice, Layout], Result]
) -> tuple[Slice | None, tuple[tuple[Slice, str], ...]]:
    """(the smallest slice of a generation that the step fits, what was said of each tried).

    A slice fits where a layout does by the analytic model and its program compiles; two layouts
    are tried on each, the fastest and the one that needs least.
    """
    said: list[tuple[Slice, str]] = []
    for one in sizes(like.chip):
        found = explore(step, one)
        if not found.fits:
            said.append((one, shortest_of(found, one)))
            continue
        for layout in dict.fromkeys((0, _least(found.fits))):
            result = compile(one, found.fits[layout])
            if result.fits:
                said.append((one, f"fits: {found.fits[layout].said}"))
                return one, tuple(said)
            said.append((one, result.message))
    return None, tuple(said)


def _least(layouts: Sequence[Layout]) -> int:
    return min(range(len(layouts)), key=lambda i: layouts[i].memory.total)


def shortest_of(found: Found, one: Slice) -> str:
    """Why nothing fits, on one line."""
    if not found.too_large:
        reasons = sorted(found.refused, key=lambda reason: -found.refused[reason])
        return f"no layout divides the step: {'; '.join(reasons[:3])}"
    least = found.too_large[0]
    return (
        f"needs {least.memory.total / GIB:.1f} GiB of {one.chip.hbm_gib:g} a device at the least "
        f"by the analytic model: {least.said}"
    )


def overlay(layout: Layout, command: str, notes: Sequence[str] = ()) -> str:
    """The YAML of a layout, to lay over the job's config."""
    head = [f"# {line}" for line in (f"Found by: {command}", layout.said, *notes)]
    lines = [f"  {axis}: {layout.sizes[axis]}" for axis in AXES]
    text = ["mesh:", *lines, "  fsdp_inner: 0", "model:", f"  remat: {layout.step.remat}"]
    text += ["batch:", f"  accumulate: {layout.step.accumulate}"]
    if layout.step.spec.head == "lm":
        text += ["train:", f"  head_chunk: {layout.step.head_chunk}"]
    return "\n".join([*head, *text]) + "\n"


def table(outcome: Outcome, one: Slice, *, rows: int = 8) -> list[str]:
    """The search to a reader: what was looked at, the best, the compiled beside the model."""
    found = outcome.found
    looked = len(found.fits) + len(found.too_large)
    lines = [
        f"{looked:,} layouts on {one.name}: {len(found.fits):,} fit "
        f"{one.chip.hbm_gib:g} GiB by the analytic model, {len(found.too_large):,} do not"
    ]
    if found.refused:
        reasons = sorted(found.refused, key=lambda reason: -found.refused[reason])
        lines.append(f"no layouts: {'; '.join(reasons[:4])}{' ...' * (len(reasons) > 4)}")
    if found.too_large:
        lines.append(f"the least that does not fit: {shortest_of(found, one)}")
    for number, layout in enumerate(found.fits[:rows], 1):
        f, needs = layout.floors, layout.memory.total / GIB
        lines.append(
            f"{number}. {layout.said}: {needs:.1f} GiB, compute {f.compute:.3f} s, HBM {f.hbm:.3f} "
            f"s, interconnect {f.network:.3f} s, at most {f.utilisation:.0%} of peak ({f.binds} "
            "binds)"
        )
    for layout, result in outcome.tried:
        lines.append(f"compiled {layout.said}: {_beside(layout, result)}")
    if outcome.winner is None:
        lines.append("no layout was found that compiles and fits")
    else:
        lines.append(f"winner: {outcome.winner.said}")
    return lines


def wire_of(layout: Layout) -> dict[str, float]:
    """Kind of collective -> bytes into a device, by the analytic model."""
    found: dict[str, float] = {}
    for each in layout.floors.collectives:
        found[each.kind] = found.get(each.kind, 0.0) + each.wire
    return found


def as_json(outcome: Outcome, one: Slice) -> dict[str, Any]:
    """The search as plain values: bytes, FLOPs and seconds of a device."""
    found = outcome.found
    return {
        "topology": one.name,
        "layouts": {"fit": len(found.fits), "too_large": len(found.too_large)},
        "refused": found.refused,
        "limit": one.chip.hbm_gib * GIB,
        "winner": outcome.winner.said if outcome.winner else None,
        "compiled": [
            {
                "layout": layout.said,
                "overrides": layout.overrides,
                "model_flops": layout.floors.model_flops,
                "peak_flops": layout.floors.peak,
                "analytic": {
                    "memory": {**dataclasses.asdict(layout.memory), "total": layout.memory.total},
                    "flops": layout.floors.flops,
                    "wire": wire_of(layout),
                    "floors": [layout.floors.compute, layout.floors.hbm, layout.floors.network],
                },
                **dataclasses.asdict(result),
            }
            for layout, result in outcome.tried
        ],
    }


def _beside(layout: Layout, result: Result) -> str:
    """A compiled program, and the analytic model's error against it."""
    if not result.fits:
        return f"does not fit: {result.message}"
    pairs = {
        "memory": (layout.memory.total, result.peak, GIB, "GiB"),
        "FLOPs": (layout.floors.flops, result.flops, 1e12, "T"),
        "wire": (sum(wire_of(layout).values()), sum((result.wire or {}).values()), 1e9, "GB"),
    }
    if result.floors is not None:
        mine = (layout.floors.compute, layout.floors.hbm, layout.floors.network)
        for name, ours, theirs in zip(
            ("compute", "HBM", "interconnect"), mine, result.floors, strict=True
        ):
            pairs[name] = (ours, theirs, 1.0, "s")
    said = []
    for name, (mine, theirs, unit, of) in pairs.items():
        if theirs:
            error = f"the model is {mine / theirs - 1:+.0%} off"
            said.append(f"{name} {theirs / unit:.4g} {of} ({error})")
    return ", ".join(said) or "it fits"
