"""Products that lose precision, and speeds that do not fit the table of peaks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from posttrain.doctor import matmul
from posttrain.doctor.base import Level, Subject
from tests.doctor.found import bad, found

EXACT = jnp.matmul


def to_bfloat16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def to_tf32(x: jax.Array) -> jax.Array:
    """Rounded to 11 significant bits."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0x1000)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFE000), jnp.float32)


def three_passes(a: jax.Array, b: jax.Array) -> jax.Array:
    high_a, high_b = to_bfloat16(a), to_bfloat16(b)
    low_a, low_b = to_bfloat16(a - high_a), to_bfloat16(b - high_b)
    return EXACT(high_a, high_b) + EXACT(high_a, low_b) + EXACT(low_a, high_b)


def lossy(default: Any, highest: Any = EXACT, bfloat16: Any = EXACT) -> Any:
    """A device: how it multiplies float32 by default, at highest, and bfloat16."""

    def product(a: jax.Array, b: jax.Array, precision: Any = None, **options: Any) -> jax.Array:
        if a.dtype == jnp.bfloat16:
            return bfloat16(a, b, **options)
        return (highest if precision == "highest" else default)(a, b)

    return product


def test_this_cpu_computes_float32_as_float32(subject: Subject) -> None:
    all_found = found(matmul.precision, subject)
    assert not bad(all_found)
    assert "computed as float32" in all_found["float32"].said


@pytest.mark.parametrize(
    ("product", "name"),
    [
        (lambda a, b: EXACT(to_bfloat16(a), to_bfloat16(b)), "one bfloat16 pass (8 bits)"),
        (lambda a, b: EXACT(to_tf32(a), to_tf32(b)), "TensorFloat-32 (11 bits)"),
        (three_passes, "three bfloat16 passes"),
    ],
)
def test_a_default_that_cuts_float32_is_named_and_how_to_ask_for_more(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, product: Any, name: str
) -> None:
    monkeypatch.setattr(matmul.jnp, "matmul", lossy(product))
    all_found = found(matmul.precision, subject)
    assert bad(all_found) == {"float32": Level.WARNING}
    finding = all_found["float32"]
    assert finding.said.endswith(f"computed as {name}")
    assert "golden figures" in finding.todo
    assert "JAX_DEFAULT_MATMUL_PRECISION=highest" in finding.todo


def test_what_is_worse_than_any_known_pass_is_wrong(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eighths(a: jax.Array, b: jax.Array) -> jax.Array:
        return EXACT(jnp.round(a * 8) / 8, b)

    monkeypatch.setattr(matmul.jnp, "matmul", lossy(eighths))
    assert bad(found(matmul.precision, subject)) == {"float32": Level.WRONG}


def test_highest_that_is_not_float32_is_wrong(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(a: jax.Array, b: jax.Array) -> jax.Array:
        return EXACT(to_tf32(a), to_tf32(b))

    monkeypatch.setattr(matmul.jnp, "matmul", lossy(cut, highest=cut))
    levels = {"float32": Level.WARNING, "float32, highest": Level.WRONG}
    assert bad(found(matmul.precision, subject)) == levels


def test_bfloat16_sums_that_are_cut_are_wrong(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(a: jax.Array, b: jax.Array, **_: Any) -> jax.Array:
        return to_bfloat16(EXACT(a, b, preferred_element_type=jnp.float32))

    monkeypatch.setattr(matmul.jnp, "matmul", lossy(EXACT, bfloat16=cut))
    assert bad(found(matmul.precision, subject)) == {"bfloat16": Level.WRONG}


def test_the_bounds_are_those_of_rounding() -> None:
    """Factors rounded on the host give the errors that the bounds are set by."""
    a, b = (x.astype(np.float64) for x in matmul._factors())
    rounded = [x.astype(ml_dtypes.bfloat16).astype(np.float64) for x in (a, b)]
    error = matmul.relative_error(rounded[0] @ rounded[1], a @ b)
    np.testing.assert_allclose(error, 0.0023, rtol=0.05)
    assert matmul.relative_error(a @ b * 1.01, a @ b) == pytest.approx(0.01)


def test_a_peak_counts_two_flops_a_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "median_seconds", lambda call, **_: 0.02)
    device = jax.local_devices()[0]
    tflops, n, seconds = matmul.measure_peak(device, jnp.float32, None)
    assert (n, seconds) == (256, 0.02)
    assert tflops == pytest.approx(2 * 256**3 / 0.02 / 1e12)


def test_sizes_grow_until_one_product_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.001, 0.004, 0.016, 0.015])
    monkeypatch.setattr(matmul, "median_seconds", lambda call, **_: next(seconds))
    assert matmul.measure_peak(jax.local_devices()[0], jnp.float32, None)[1:] == (1024, 0.015)


def test_on_a_cpu_the_peak_is_told_and_nothing_is_wrong(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_LONG_ENOUGH", 0)
    all_found = found(matmul.peak, subject)
    assert not bad(all_found)
    assert list(all_found) == ["float32", "bfloat16", "MFU"]


@pytest.mark.parametrize(
    ("kind", "measured", "stated", "level"),
    [
        ("NVIDIA H100 80GB HBM3", 700, None, Level.OK),
        ("NVIDIA H100 80GB HBM3", 500, None, Level.WARNING),  # 51% of 989
        ("NVIDIA H100 80GB HBM3", 1200, None, Level.PROBLEM),
        ("NVIDIA H100 80GB HBM3", 700, 1979, Level.WARNING),  # the sparse figure
        ("NVIDIA L40S", 200, None, Level.WARNING),
        ("NVIDIA L40S", 300, 362, Level.OK),
        ("cpu", 0.1, None, Level.OK),
    ],
)
def test_the_table_of_peaks_is_held_to_what_was_measured(
    kind: str, measured: float, stated: float | None, level: Level
) -> None:
    device = SimpleNamespace(device_kind=kind, platform="cpu" if kind == "cpu" else "gpu")
    finding = matmul._against_table(device, measured, stated)
    assert finding.level == level
    assert bool(finding.todo) == (level > Level.OK)


def test_a_device_that_lags_is_named() -> None:
    assert matmul._alike([100, 99, 101, 98]).level == Level.OK
    finding = matmul._alike([100, 99, 60, 98])
    assert finding.level == Level.WARNING
    assert finding.todo.startswith("device 2 ")
