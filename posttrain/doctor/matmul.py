"""Matrix multiplication: how exact a device's is by default, and how fast.

Errors are root mean squares relative to the root mean square of a float64 product. FLOP/s count
2 n^3 for a product of two n x n matrices.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain.doctor.base import Finding, Findings, Level, Subject, duration, median_seconds
from posttrain.train.throughput import PEAK_TFLOPS

M, K, N = 256, 512, 256  # of the products that are compared
FLOAT32 = 3e-6  # a product of float32 in float32: 24 bits, and a sum of K terms
# up to this error, this is what float32 factors were cut to: rounding both to b bits gives about
# 0.59 * 2**-b of error (0.0023 for bfloat16, 0.00029 for TF32)
_CUT = (
    (FLOAT32, "float32"),
    (6e-5, "three bfloat16 passes"),
    (1e-3, "TensorFloat-32 (11 bits)"),
    (6e-3, "one bfloat16 pass (8 bits)"),
)
_LARGEST = 16384
_LONG_ENOUGH = 0.01  # seconds of one product, against which its dispatch is small
_SLOW, _ABOVE_PEAK = 0.6, 1.05  # parts of the stated peak
_LAGGING = 0.8  # of the median of a host's devices


def relative_error(found: Any, wanted: np.ndarray) -> float:
    """Root mean square of the difference, relative to that of `wanted`."""
    difference = np.asarray(found, np.float64) - wanted
    return float(np.sqrt(np.mean(difference**2) / np.mean(wanted**2)))


@functools.cache
def _factors() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(M, K)), rng.normal(size=(K, N))
    return a.astype(np.float32), b.astype(np.float32)


def float32_error(precision: str | None = None) -> float:
    """Of a float32 product on the first device, at a precision of JAX's (None: the default)."""
    a, b = _factors()
    found = jax.jit(functools.partial(jnp.matmul, precision=precision))(a, b)
    return relative_error(found, a.astype(np.float64) @ b.astype(np.float64))


def bfloat16_error() -> float:
    """Of a product of bfloat16 factors that asks for a float32 result, as the vocabulary head does.

    The float64 product is of the rounded factors: what is left is how the device sums.
    """
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in _factors())
    found = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))(a, b)
    return relative_error(found, np.asarray(a, np.float64) @ np.asarray(b, np.float64))


def precision(on: Subject) -> Findings:
    """matrix products against float64: how exact by default, and at `highest`"""
    on.local_devices()
    default, highest = float32_error(), float32_error("highest")
    cut = next((name for bound, name in _CUT if default <= bound), None)
    asked = jax.config.values.get("jax_default_matmul_precision")
    by = f"JAX_DEFAULT_MATMUL_PRECISION={asked}" if asked else "the default"
    figures = {"float32_error": default, "float32_highest_error": highest}
    said = f"error {default:.1e} by {by}: computed as {cut}"
    broken = "do not train on this device: report it, with the versions above"
    if cut is None:
        said = f"error {default:.1e} by {by}: worse than one bfloat16 pass"
        yield Finding("float32", said, Level.WRONG, broken, figures)
    elif default <= FLOAT32:
        yield Finding("float32", said, figures=figures)
    else:
        todo = (
            "nothing for training in bfloat16, which loses as much. model.dtype=float32 is not "
            "float32 here, and golden figures (loss within 1e-4) cannot be expected; "
            "JAX_DEFAULT_MATMUL_PRECISION=highest in the environment gives them, slower "
            "(see matmul below)"
        )
        yield Finding("float32", said, Level.WARNING, todo, figures)
    fine = highest <= FLOAT32
    yield Finding(
        "float32, highest",
        f"error {highest:.1e}" + ("" if fine else f": not float32 (at most {FLOAT32:.0e})"),
        Level.OK if fine else Level.WRONG,
        "" if fine else broken,
    )
    error = bfloat16_error()
    fine = error <= 1e-4
    yield Finding(
        "bfloat16",
        f"error {error:.1e} into float32: "
        + ("sums are float32" if fine else "sums are not float32: losses will be coarse"),
        Level.OK if fine else Level.WRONG,
        "" if fine else broken,
        {"bfloat16_error": error},
    )


def peak(on: Subject) -> Findings:
    """matrix products: how fast, and what MFU is measured against"""
    local = on.local_devices()
    first = local[0]
    best = 0.0
    cases: list[tuple[str, Any, str | None]] = [("float32", jnp.float32, None)]
    if first.platform != "cpu":
        cases.append(("float32, highest", jnp.float32, "highest"))
    cases.append(("bfloat16", jnp.bfloat16, None))
    for name, dtype, precision in cases:
        tflops, n, seconds = measure_peak(first, dtype, precision)
        best = max(best, tflops)
        said = f"{_flops(tflops)} ({n} x {n}, {duration(seconds)})"
        yield Finding(name, said, figures={"tflops": tflops, "n": n, "seconds": seconds})
    if first.platform != "cpu" and len(local) > 1:
        yield _alike([measure_peak(d, jnp.bfloat16, None)[0] for d in local])
    yield _against_table(first, best, on.peak_tflops)


def _flops(tflops: float) -> str:
    return f"{tflops:,.0f} TFLOP/s" if tflops >= 10 else f"{tflops * 1e3:,.0f} GFLOP/s"


def measure_peak(device: Any, dtype: Any, precision: str | None) -> tuple[float, int, float]:
    """(TFLOP/s, n, seconds): n doubles until one product takes long enough to be measured."""
    product = jax.jit(functools.partial(jnp.matmul, precision=precision))
    n = 256 if device.platform == "cpu" else 2048
    while True:
        with jax.default_device(device):
            x = jax.random.normal(jax.random.key(0), (n, n), dtype)
        if median_seconds(lambda x=x: product(x, x), times=1) >= _LONG_ENOUGH or n >= _LARGEST:
            seconds = median_seconds(lambda x=x: product(x, x))
            return 2 * n**3 / seconds / 1e12, n, seconds
        n *= 2


def _alike(tflops: list[float]) -> Finding:
    slowest, usual = min(tflops), float(np.median(tflops))
    lags = slowest < _LAGGING * usual
    return Finding(
        "devices of this host",
        f"{slowest:.3g} to {max(tflops):.3g} TFLOP/s in bfloat16, one after another",
        Level.WARNING if lags else Level.OK,
        f"device {tflops.index(slowest)} holds up all the others: look at its heat, its power cap "
        "and who else uses it"
        if lags
        else "",
        {"tflops_by_device": tflops},
    )


def _against_table(device: Any, best: float, stated: float | None) -> Finding:
    kind = device.device_kind
    peak = stated or PEAK_TFLOPS.get(kind)
    where = "log.peak_tflops" if stated else "the table of peaks"
    if peak is None:
        said = f"not shown: no peak is known of {kind!r}"
        level = Level.OK if device.platform == "cpu" else Level.WARNING
        todo = "set log.peak_tflops to the dense bfloat16 TFLOP/s of the maker's data sheet"
        if device.platform == "cpu":
            said += f" (log.peak_tflops={best:.3g} makes it a share of the best above)"
            todo = ""
        return Finding("MFU", said, level, todo)
    share = best / peak
    said = f"{where} has {peak:g} TFLOP/s: the best above is {share:.0%} of it"
    level, todo = Level.OK, ""
    if share > _ABOVE_PEAK:
        level = Level.PROBLEM
        todo = "more than the peak: the MFU would be too high; set log.peak_tflops to the true one"
    elif share < _SLOW:
        level = Level.WARNING
        todo = (
            f"under {_SLOW:.0%}: look at heat, power cap, and who else uses the device; if "
            "the peak stated is of another precision or of sparse matrices, set log.peak_tflops"
        )
    return Finding("MFU", said, level, todo, {"peak_tflops": peak, "share": share})
