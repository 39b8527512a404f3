"""Rows times their group's matrix: both ways against float64, with gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.models import grouped_matmul as module
from posttrain.models.grouped_matmul import grouped_matmul

K, N = 6, 5
SIZES = {
    "crossing tiles": [5, 0, 17, 2],
    "one has all": [0, 24, 0, 0],
    "rows of none": [3, 0, 4, 1],
    "all of none": [0, 0, 0, 0],
    "on the borders": [4, 8, 4, 8],
}


def expected(x: np.ndarray, w: np.ndarray, sizes: list[int], ct: np.ndarray) -> tuple[Any, ...]:
    """(result, gradient of x, of w), one row after another."""
    out, dx, dw = np.zeros((len(x), N)), np.zeros(x.shape), np.zeros(w.shape)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[row] = x[row].astype(np.float64) @ w[group]
        dx[row] = w[group].astype(np.float64) @ ct[row]
        dw[group] += np.outer(x[row], ct[row])
    return out, dx, dw


@pytest.mark.parametrize("rows", [24, 23])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("implementation", ["ragged", "tiles"])
def test_equals_the_definition_with_gradients(
    implementation: str, sizes: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_tile", lambda rows, groups: 4)
    rng = np.random.default_rng(0)
    x, ct = (rng.normal(size=(rows, n)).astype(np.float32) for n in (K, N))
    w = rng.normal(size=(4, K, N)).astype(np.float32)
    groups = np.minimum(np.cumsum(SIZES[sizes]), rows)  # 23 rows: the last group ends early
    groups = np.diff(groups, prepend=0)

    @jax.jit
    def run(x: Any, w: Any, groups: Any) -> Any:
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, groups, implementation), x, w)
        return out, *pull(ct)

    found = run(x, w, groups.astype(np.int32))
    for got, want in zip(found, expected(x, w, groups.tolist(), ct), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("implementation", ["ragged", "tiles"])
def test_sums_are_in_float32(implementation: str) -> None:
    """Of 4,096 numbers, which no bfloat16 sum holds; a matrix's gradient is one of rows."""
    ones = jnp.ones((4096, 8), jnp.bfloat16)
    sizes = jnp.array([0, 4096], jnp.int32)
    w = jnp.ones((2, 8, 4096), jnp.bfloat16)

    def total(x, w):
        return grouped_matmul(x, w, sizes, implementation).astype(jnp.float32).sum()

    dx, dw = jax.grad(total, (0, 1))(ones, w)
    assert (dx == 4096).all()
    assert (dw[1] == 4096).all()
    assert not dw[0].any()


def test_tiles_are_few_rows_where_groups_are_small() -> None:
    """Each group fills its last tile partly: with 128 groups of 16 rows, tiles of 256 would be 16
    times the work."""
    for rows, groups in [(4096, 8), (2048, 128), (64, 8), (8, 64)]:
        tile = module._tile(rows, groups)
        visits = -(-rows // tile) + groups - 1
        assert visits * tile <= 2.5 * rows + 8 * groups
        assert 8 <= tile <= 256
