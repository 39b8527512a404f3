"""Compiling: how long it takes, and does the cache spare the second start."""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from posttrain.doctor.base import Finding, Findings, Level, Subject, duration

_PROGRAM = "posttrain_doctor_probe"  # names its file in the cache, too
_HIT, _WRITTEN = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
_OFF = "set JAX_COMPILATION_CACHE_DIR to a folder, so that the second start is quick"


def compile_cache(on: Subject) -> Findings:
    """how long a compile takes, and is it kept for the next start"""
    on.local_devices()
    folder = jax.config.values.get("jax_compilation_cache_dir")
    enabled = jax.config.values.get("jax_enable_compilation_cache")
    cold, warm, events, refusal = twice(uuid.uuid4().int % 2**20, folder)
    yield Finding(
        "compile",
        f"{duration(cold)} for gradients of two small layers",
        figures={"cold_s": cold, "warm_s": warm, "cache_dir": folder},
    )
    if on.channel.process:
        return  # jax lets process 0 alone write to the cache
    if not folder or not enabled:
        why = "no folder is named" if enabled else "JAX_ENABLE_COMPILATION_CACHE is false"
        yield Finding("cache", f"off: {why}", Level.WARNING, _OFF)
    elif refusal:
        todo = f"make {folder} writable, or set JAX_COMPILATION_CACHE_DIR to another folder"
        yield Finding("cache", f"{folder}: {refusal}", Level.PROBLEM, todo)
    elif _HIT not in events:
        what = "written, and not read again" if _WRITTEN in events else "not written"
        todo = (
            "every start compiles anew: try an empty folder in JAX_COMPILATION_CACHE_DIR, or go on "
            "without"
        )
        yield Finding("cache", f"{folder}: {what}", Level.PROBLEM, todo)
    else:
        least = jax.config.values.get("jax_persistent_cache_min_compile_time_secs")
        said = f"{folder}: the second time {duration(warm)}; keeps what took over {least:g} s"
        yield Finding("cache", said)


def _probe(salt: int) -> Any:
    """A program that no cache has seen: the salt is a constant in it."""

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        for i in range(2):
            x = jnp.tanh(x @ weights[i]) + jax.nn.softmax(x) * salt
        return x.sum()

    loss.__name__ = f"{_PROGRAM}_{salt}"
    return jax.jit(jax.grad(loss)).lower(jnp.ones((2, 32, 32)), jnp.ones((16, 32)))


def twice(salt: int, folder: str | None) -> tuple[float, float, list[str], str]:
    """(seconds of the first compile, of the second, events of the cache, what it refused)."""
    with _every_entry_kept(), _events() as events, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seconds, refusal = [], ""
        try:
            for _ in range(2):
                lowered = _probe(salt)
                began = time.perf_counter()
                lowered.compile()
                seconds.append(time.perf_counter() - began)
        finally:
            _forget(folder, salt)
    for warning in said:
        if "compilation cache" in str(warning.message):
            refusal = str(warning.message).splitlines()[0]
    return seconds[0], seconds[1], events, refusal


@contextmanager
def _every_entry_kept() -> Iterator[None]:
    """Inside, the cache takes programs that compile quickly."""
    names = (
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: jax.config.values[name] for name in names}
    try:
        for name, value in zip(names, (0.0, -1), strict=True):
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@contextmanager
def _events() -> Iterator[list[str]]:
    """The names of jax's events while inside."""
    seen: list[str] = []

    def listen(event: str, **_: Any) -> None:
        seen.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _forget(folder: str | None, salt: int) -> None:
    """The probe's own entries are of no use to anybody; a bucket's are left to its rules. Those of
    another doctor at work in the same folder are left to it."""
    if folder and "://" not in folder and Path(folder).is_dir():
        for path in Path(folder).glob(f"jit_{_PROGRAM}_{salt}-*"):
            path.unlink(missing_ok=True)
