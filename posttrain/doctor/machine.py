"""The host and its devices: what is there, and is it what JAX uses."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from posttrain.config import ConfigError
from posttrain.doctor.base import Finding, Findings, Level, Subject, size
from posttrain.sharding import make_mesh

_SYSTEM = Path("/")  # where /sys, /dev and /proc lie
_LITTLE_RAM = 2 << 30
_MEMORY = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),  # control groups of version 1
)
_NVIDIA, _DISPLAYS = "0x10de", ("0x0300", "0x0302")  # PCI vendor, and classes of its cards
_GOOGLE = "0x1ae0"  # PCI vendor, and its devices that are TPUs
_TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


def host(on: Subject) -> Findings:
    """cores, memory, other work"""
    cores, quota = len(os.sched_getaffinity(0)), _cpu_quota()
    limited = f", and the container may use {quota:g} of them" if quota and quota < cores else ""
    yield Finding(
        "cores",
        f"{cores} of {os.cpu_count()} may be used{limited}",
        figures={"cores": cores, "cpu_quota_cores": quota},
    )
    yield _memory()
    load, usable = os.getloadavg()[0], min(cores, quota or cores)
    busy = load > 0.5 * usable
    yield Finding(
        "load",
        f"{load:.1f} processes at work in the last minute, on average",
        Level.WARNING if busy else Level.OK,
        "the speeds found here are lower than the machine's own: run doctor when it is idle"
        if busy
        else "",
        {"load_1min": load},
    )


def _cpu_quota() -> float | None:
    """Cores that the control groups grant; None without a limit."""
    granted = []
    for group in _groups("cpu"):
        with suppress(OSError, ValueError):  # not there, or without a limit ("max")
            quota, period = map(int, (group / "cpu.max").read_text().split())
            granted.append(quota / period)
        with suppress(OSError, ValueError):  # version 1, where -1 is without a limit
            quota = int((group / "cpu.cfs_quota_us").read_text())
            period = int((group / "cpu.cfs_period_us").read_text())
            granted += [quota / period] if quota > 0 else []
    return min(granted, default=None)


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups that bind this process: its own and those above it, of
    version 2, and of the controller's where it is version 1."""
    root = _SYSTEM / "sys/fs/cgroup"
    try:
        lines = (_SYSTEM / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines or ["0::/"]:
        number, controllers, inner = line.split(":", 2)
        if number == "0" or controller in controllers.split(","):
            own = Path(inner.strip("/"))
            top = root if number == "0" else root / controller
            # inside a container the own one may lie at the top, whatever its name
            yield from (top / group for group in (own, *own.parents))


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for group in _groups("memory"):
        for bound, usage in _MEMORY:
            with suppress(OSError, ValueError):  # not there, or without a limit ("max")
                limit = int((group / bound).read_text())
                used = int((group / usage).read_text()) - _cached(group)
                total, free = min(total, limit), max(0, min(free, limit - used))
    little = free < _LITTLE_RAM
    return Finding(
        "memory",
        f"{size(total)}, {size(free)} free",
        Level.PROBLEM if little else Level.OK,
        f"a run needs more than {size(_LITTLE_RAM)}: end other processes, or take a larger host"
        if little
        else "",
        {"memory_bytes": total, "memory_free_bytes": free},
    )


def _cached(group: Path) -> int:
    """Bytes of files that the kernel keeps as long as nobody needs the room: they count as used."""
    file = group / "memory.stat"
    lines = file.read_text().splitlines() if file.exists() else []
    kept = {name: int(value) for name, value in map(str.split, lines)}
    names = ("inactive_file", "active_file")
    return sum(kept.get(f"total_{name}", kept.get(name, 0)) for name in names)


def devices(on: Subject) -> Findings:
    """kind, count, memory, and does each compute"""
    try:
        local = on.local_devices()
    except RuntimeError as error:
        yield Finding(
            "devices",
            f"JAX finds none: {error}",
            Level.PROBLEM,
            "if another process holds them, end it (`sudo lsof -w /dev/accel* /dev/vfio/*`, "
            "`nvidia-smi`); if the driver or plugin is missing, install jax[tpu] or jax[cuda13] "
            "with -c constraints.txt; JAX_PLATFORMS=cpu works without",
        )
        return
    kinds = Counter(d.device_kind for d in jax.devices())
    said = ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
    processes = f"in {jax.process_count()} process" + ("es" if jax.process_count() > 1 else "")
    yield Finding(
        "devices",
        f"{said}, {processes}, {len(local)} in this one",
        figures={
            "kinds": dict(kinds),
            "platform": local[0].platform,
            "devices": jax.device_count(),
            "local_devices": len(local),
            "processes": jax.process_count(),
        },
    )
    yield from _as_one(kinds)
    yield from _passed_over(local[0].platform)
    yield _device_memory(local)
    yield from _each_computes(local)
    yield _mesh(on)


def _as_one(kinds: Counter[str]) -> Findings:
    counts = Counter(d.process_index for d in jax.devices())
    if len(kinds) > 1 or len(set(counts.values())) > 1:
        yield Finding(
            "alike",
            "the processes hold unlike devices: "
            + ", ".join(f"process {p}: {n}" for p, n in sorted(counts.items())),
            Level.PROBLEM,
            "start the same command on hosts of one kind, with every device visible on each "
            "(CUDA_VISIBLE_DEVICES, TPU_VISIBLE_CHIPS)",
        )


def _passed_over(platform: str) -> Findings:
    """An accelerator that is in the machine, while JAX computes on the CPU."""
    if platform != "cpu":
        return
    found = _accelerators()
    if not found:
        return
    kind, extra, first = found
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked:
        said = f"{kind} is in this machine, and JAX_PLATFORMS={asked} keeps JAX from it"
        yield Finding("accelerator", said, Level.WARNING, f"{first}unset JAX_PLATFORMS to use it")
        return
    yield Finding(
        "accelerator",
        f"{kind} is in this machine, and JAX computes on the CPU",
        Level.PROBLEM,
        f"{first}pip install 'jax[{extra}]' -c constraints.txt; if it is installed, `JAX_PLATFORMS="
        f"{extra.rstrip('0123456789')} python -c 'import jax; jax.devices()'` says what is wrong",
    )


def _accelerators() -> tuple[str, str, str] | None:
    """(What is in the machine, JAX's extra for it, what is to be done before)."""
    if any((_SYSTEM / f"dev/{name}").exists() for name in ("nvidia0", "nvidiactl", "dxg")):
        return "an NVIDIA card", "cuda13", ""
    for vendor in (_SYSTEM / "sys/bus/pci/devices").glob("*/vendor"):
        maker, card = vendor.read_text().strip(), vendor.parent
        if maker == _GOOGLE and (card / "device").read_text().strip() in _TPUS:
            return "a TPU", "tpu", ""
        if maker == _NVIDIA and (card / "class").read_text().startswith(_DISPLAYS):
            driver = "install or load its driver (`nvidia-smi` must list the card); then "
            return "an NVIDIA card without a driver", "cuda13", driver
    return None


def _device_memory(local: list[Any]) -> Finding:
    stats = [d.memory_stats() or {} for d in local]
    limits = [s["bytes_limit"] for s in stats if "bytes_limit" in s]
    if not limits:
        return Finding("device memory", "the host's")
    least, most = min(limits), max(limits)
    said = size(least) + (f" to {size(most)}" if most > least else "")
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    part = f" (JAX takes {share} of a card, " if local[0].platform == "gpu" else ""
    note = f"{part}XLA_PYTHON_CLIENT_MEM_FRACTION)" if part else ""
    return Finding("device memory", f"{said} each{note}", figures={"device_memory_bytes": limits})


def _each_computes(local: list[Any]) -> Findings:
    values = np.arange(1024, dtype=np.float32)
    total = float(np.sum(values * 2 + 1))
    add = jax.jit(lambda x: (x * 2 + 1).sum())
    wrong = []
    for device in local:
        found = float(add(jax.device_put(values, device)))
        if found != total:
            wrong.append(f"{device} gives {found}, not {total}")
    if wrong:
        todo = "take these devices out of use: they are broken"
        yield Finding("each computes", "; ".join(wrong), Level.WRONG, todo)
    else:
        yield Finding("each computes", f"{len(local)} of {len(local)} add 1,024 numbers rightly")


def _mesh(on: Subject) -> Finding:
    try:
        mesh = make_mesh(on.mesh)
    except ConfigError as error:
        todo = "set mesh.data, mesh.fsdp and mesh.tensor for this number of devices"
        return Finding("mesh", str(error), Level.PROBLEM, todo)
    shape = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
    return Finding("mesh", shape, figures={"mesh": dict(mesh.shape)})
