"""A program that does not fit: what is needed, what there is, what to change, in plain words.

A failed compilation tells one number. The rest is known from shapes: what the arguments take.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from posttrain.plan.chips import GIB

_NEEDED = re.compile(r"total memory required[^(]*\(([\d.]+)([KMGT]?)\)")
_THERE = re.compile(r"available HBM \(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


@dataclass(frozen=True)
class Overflow:
    """Bytes of one device. held: what stays there between runs, by name; needed: by the compiler;
    None: it did not say."""

    name: str
    needed: float | None
    limit: float | None
    held: Mapping[str, float]
    said: str = ""  # the compiler's own words


def is_overflow(error: Exception) -> bool:
    """Whether a compilation failed for want of memory."""
    return "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error)


def read_overflow(
    error: Exception, name: str, held: Mapping[str, float], limit: float | None
) -> Overflow:
    """What the compiler's error says."""
    text = str(error)
    there = _bytes(_THERE, text)
    return Overflow(name, _bytes(_NEEDED, text), there or limit, dict(held), text.splitlines()[0])


def _bytes(pattern: re.Pattern[str], text: str) -> float | None:
    found = pattern.search(text)
    return float(found[1]) * _UNITS[found[2]] if found else None


def sentence(one: Overflow, *, rows: int = 1, remat: str = "full", fsdp: bool = True) -> str:
    """What is needed, what there is, what to change, most to the point first.

    rows: of a micro-batch on one device. remat: as model.remat. fsdp: whether more devices would
    cut the weights further.
    """
    kept = sum(one.held.values())
    named = ", ".join(
        f"{name} {size / GIB:.2f}" for name, size in one.held.items() if size >= GIB / 100
    )
    needed = f"{one.needed / GIB:.2f} GiB" if one.needed else "more than there is"
    limit = f"{one.limit / GIB:.2f} GiB" if one.limit else "less"
    room = f"{(one.limit - kept) / GIB:.2f} GiB" if one.limit else "the rest"
    said = f"{one.name} does not fit: a device needs {needed}, and has {limit}. "
    if one.limit and kept >= one.limit:
        said += f"What stays there alone is {kept / GIB:.2f} GiB ({named})"
        advice = ["cut the weights over more devices (mesh.fsdp, mesh.tensor, a larger slice)"]
        advice += ["store less (model.param_dtype=bfloat16, optim.moment_dtype=bfloat16, lora)"]
    else:
        said += f"{kept / GIB:.2f} GiB of it stay there ({named}), which leaves {room} for a run"
        advice = []
        if rows > 1:
            advice.append(
                f"raise batch.accumulate: {rows} rows are on a device at a time, 1 will do"
            )
        if remat not in ("full", "offload"):
            advice.append(f"set model.remat=full: {remat} keeps more of each layer")
        if rows <= 1:
            advice.append("cut rows (mesh.context) or each matmul (mesh.tensor)")
        if fsdp:
            advice.append("take a larger slice or more of the weights' devices (mesh.fsdp)")
        advice.append("lower train.head_chunk")
    return said + ". To change: " + "; or ".join(advice) + "."
