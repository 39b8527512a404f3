"""A compiled program in words: what a device holds, does and sends, and what that would cost."""

from __future__ import annotations

import math
from collections.abc import Iterator

from posttrain.plan.chips import GIB
from posttrain.plan.collectives import Collective
from posttrain.plan.compiled import Compiled
from posttrain.plan.prices import Prices
from posttrain.plan.topology import Slice

NOT_MEASURED = (
    "Each time is a model: the FLOPs, bytes and collectives of the program's text over what the "
    "chip's makers state. Nothing ran, and nothing runs faster; expect slower."
)
_SHOWN = 12  # collectives, the largest


def lines(one: Compiled, slice_: Slice | None, devices: int) -> Iterator[str]:
    """Of one program: memory, arithmetic, collectives, floors."""
    yield f"{one.name}, of one device of {devices:,}:"
    yield from _memory(one)
    yield from _arithmetic(one)
    yield from _collectives(one)
    if slice_ is not None:
        yield from _floors(one, slice_)
    yield f"  compiled in {one.seconds:.0f} s, {one.host_gib:.1f} GiB of this machine's memory"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _memory(one: Compiled) -> Iterator[str]:
    memory = one.memory
    for name, size in memory.held.items():
        if size >= 2**17 or name in ("parameters", "optimiser"):
            yield f"  {name:<24} {_gib(size):>12}"
    if memory.gradients:
        yield f"  {'gradients, float32':<24} {_gib(memory.gradients):>12}"
    yield f"  {'activations and the rest':<24} {_gib(memory.activations):>12}"
    limit = f" of {_gib(memory.limit)}" if memory.limit else ""
    yield f"  {'peak':<24} {_gib(memory.peak):>12}{limit}"
    yield f"  {'(all temporaries':<24} {_gib(memory.temporaries):>12})"


def _arithmetic(one: Compiled) -> Iterator[str]:
    said = []
    if one.kernels:
        said.append(f"{one.kernels / one.flops:.0%} of it in attention's kernels")
    if one.dynamic:
        said.append(f"{one.dynamic / one.flops:.0%} in loops that may end earlier")
    if one.needed:
        said.append(f"{one.needed / 1e12:.4g} needed, by the convention of training's MFU")
    yield f"  matmuls {one.flops / 1e12:.4g} TFLOP" + "".join(f"; {part}" for part in said)
    if one.cycles and one.flops:
        share = one.estimated / one.flops
        yield f"  the compiler's own cycle estimates cover {share:.0%} of these FLOPs"


def _collectives(one: Compiled) -> Iterator[str]:
    rows = merged(one.collectives)
    if not rows:
        return
    total = sum(row.total for row in rows)
    kinds: dict[str, float] = {}
    for row in rows:
        kinds[row.kind] = kinds.get(row.kind, 0.0) + row.total
    named = ", ".join(f"{kind} {size / 1e9:.4g}" for kind, size in kinds.items())
    yield f"  sent: {total / 1e9:.4g} GB in a step ({named})"
    for row in rows[:_SHOWN]:
        of = row.weight or "sums, several weights or activations"
        side = f" ({', '.join(row.sides)})" if row.sides else ""
        when = "overlapped" if row.overlaps else "waited for"
        yield (
            f"    {row.kind:<18} {row.total / 1e9:>9.4g} GB  {of}{' (gradient)' * row.backward}, "
            f"{row.times:,} x over {' x '.join(row.axes) or 'nothing'}{side}, {when}"
        )
    if rest := rows[_SHOWN:]:
        size = sum(row.total for row in rest)
        yield f"    {len(rest)} more{' ':<12} {size / 1e9:>9.4g} GB"


def merged(found: tuple[Collective, ...]) -> list[Collective]:
    """Those alike in all but their bytes in one, the largest first: bytes of a run are the mean."""
    rows: dict[tuple[object, ...], list[Collective]] = {}
    for one in found:
        key = (one.kind, one.weight, one.backward, one.axes, one.sides, one.size, one.overlaps)
        rows.setdefault(key, []).append(one)
    out = []
    for alike in rows.values():
        first, times = alike[0], sum(one.times for one in alike)
        mean = sum(one.total for one in alike) / times
        out.append(
            Collective(
                *(first.kind, first.weight, first.backward, first.axes, first.sides, first.size),
                *(times, mean, first.overlaps),
            )
        )
    return sorted(out, key=lambda one: -one.total)


def _floors(one: Compiled, slice_: Slice) -> Iterator[str]:
    times, chip = one.times, slice_.chip
    yield (
        f"  floors: compute {_seconds(times.compute)}, HBM {_seconds(times.hbm)} "
        f"({one.hbm_bytes / 1e9:.4g} GB), interconnect {_seconds(times.network)}: "
        f"{times.binds} binds"
    )
    peak = chip.tflops * 1e12 / chip.devices
    if one.needed and times.least:
        share = one.needed / times.least / peak
        none = one.needed / times.serial / peak
        yield (
            f"  at most {share:.1%} of {chip.tflops:g} TFLOP/s a chip where all of it overlaps, "
            f"{none:.1%} where nothing does"
        )


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def cost(
    one: Compiled, slice_: Slice, prices: Prices, steps: int | None, *, spot: bool
) -> Iterator[str]:
    """Tokens a second, hours and money of a run at its floors: of all devices."""
    if not one.times.least or math.isnan(one.times.least):
        return
    chips = slice_.chips * slice_.slices
    for seconds, how in ((one.times.least, "at best"), (one.times.serial, "nothing overlapped")):
        hours = 1e9 / (one.tokens / seconds) / 3600
        yield (
            f"  {how}: {one.tokens / seconds:,.0f} tokens/s; a billion tokens in {hours:.2f} h, "
            f"{prices.cost(slice_.chip.name, hours * chips, spot=spot)}"
        )
        if steps:
            run = steps * seconds / 3600
            said = prices.cost(slice_.chip.name, run * chips, spot=spot)
            yield f"    the run's {steps:,} steps: {run:.2f} h, {said}"
