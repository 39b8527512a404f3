"""Attention within segments: a float64 definition, and every kernel against the reference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posttrain.models.attention as attention_module
from posttrain.models.attention import attention, cached_attention, resolve
from tests.models.tiny import mesh_of

B, T, N, K, H = 2, 128, 4, 2, 16
ON_GPU = jax.default_backend() == "gpu"


@pytest.fixture(scope="module")
def case() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    segments = np.zeros((B, T), np.int32)
    segments[0, :50], segments[0, 50:51], segments[0, 51:110] = 1, 2, 3
    segments[1, :128] = 1
    shapes = {"q": N, "k": K, "v": K}
    arrays = {name: rng.normal(size=(B, T, n, H)).astype(np.float32) for name, n in shapes.items()}
    return arrays | {"segments": segments}


def run(case: dict[str, Any], implementation: str, **options: Any) -> jax.Array:
    qkv = (case[name] for name in ("q", "k", "v"))
    return attention(*qkv, case["segments"], implementation=implementation, **options)


def expected(case: dict[str, np.ndarray]) -> np.ndarray:
    """The definition, one query after another, in float64; padding stays 0."""
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        segment = case["segments"][b, t]
        seen = [s for s in range(t + 1) if segment and case["segments"][b, s] == segment]
        if seen:
            k, v = (case[x][b, seen, n // (N // K)].astype(np.float64) for x in ("k", "v"))
            scores = k @ case["q"][b, t, n].astype(np.float64) / np.sqrt(H)
            p = np.exp(scores - scores.max())
            out[b, t, n] = p / p.sum() @ v
    return out


def real(case: dict[str, np.ndarray], x: Any) -> np.ndarray:
    return np.asarray(x) * (case["segments"] > 0)[..., None, None]


def test_reference_equals_the_definition(case: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(real(case, run(case, "reference")), expected(case), atol=2e-6)


@pytest.mark.parametrize("chunk", [37, 64, 128])
def test_chunked_equals_the_definition_and_the_references_gradients(
    case: dict[str, np.ndarray], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "_CHUNK", chunk)
    np.testing.assert_allclose(real(case, run(case, "chunked")), expected(case), atol=2e-6)
    mask = (case["segments"] > 0)[..., None, None]

    def loss(implementation: str, qkv: dict[str, Any]) -> jax.Array:
        return jnp.sum(jnp.sin(run(case | qkv, implementation) * 3) * mask)

    qkv = {name: case[name] for name in ("q", "k", "v")}
    want = jax.grad(lambda x: loss("reference", x))(qkv)
    found = jax.grad(lambda x: loss("chunked", x))(qkv)
    for name, grad in want.items():
        np.testing.assert_allclose(found[name], grad, atol=2e-5, err_msg=name)


def test_chunked_needs_half_of_the_references_memory() -> None:
    def temporary(implementation: str) -> int:
        q = jax.ShapeDtypeStruct((1, 2048, 4, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
        f = lambda q, k, v, s: attention(q, k, v, s, implementation=implementation).sum()  # noqa: E731
        return (
            jax.jit(jax.grad(f)).lower(q, q, q, ids).compile().memory_analysis().temp_size_in_bytes
        )

    assert temporary("chunked") < temporary("reference") * 0.55


@pytest.mark.parametrize("shape", [None, (2, 1, 2)])
def test_splash_equals_the_reference_with_gradients(
    case: dict[str, np.ndarray], shape: tuple[int, ...] | None
) -> None:
    def loss(implementation: str, options: dict[str, Any], qkv: dict[str, Any]) -> jax.Array:
        out = run(case | qkv, implementation, **options)
        return jnp.sum(jnp.sin(out * 3) * (case["segments"] > 0)[..., None, None])

    qkv = {name: case[name] for name in ("q", "k", "v")}
    want = jax.grad(lambda x: loss("reference", {}, x))(qkv)
    kernel = jax.jit(jax.grad(lambda x: loss("splash", {"interpret": True}, x)))
    if shape is None:
        found = kernel(qkv)
    else:
        with jax.set_mesh(mesh_of(*shape)):
            found = kernel(qkv)
    for name, grad in want.items():
        np.testing.assert_allclose(found[name], grad, atol=2e-5, err_msg=name)


@pytest.mark.skipif(not ON_GPU, reason="cudnn attention needs a GPU")
def test_cudnn_equals_the_reference(case: dict[str, np.ndarray]) -> None:
    half = {n: jnp.asarray(x, jnp.bfloat16) if n != "segments" else x for n, x in case.items()}
    np.testing.assert_allclose(real(case, run(half, "cudnn")), expected(case), atol=2e-2)


KERNELS = [
    ("reference", {}),
    ("chunked", {}),
    ("splash", {"interpret": True}),
    pytest.param(
        "cudnn", {}, marks=pytest.mark.skipif(not ON_GPU, reason="cudnn attention needs a GPU")
    ),
]


@pytest.mark.parametrize(("implementation", "options"), KERNELS)
def test_pitfall_14_segments_do_not_see_each_other(
    case: dict[str, np.ndarray], implementation: str, options: dict[str, Any]
) -> None:
    """Changing one segment changes no other: a kernel that ignored segment ids would."""
    dtype = jnp.bfloat16 if implementation == "cudnn" else jnp.float32
    case = {n: jnp.asarray(x, dtype) if n != "segments" else x for n, x in case.items()}
    changed = {n: case[n].at[0, :50].add(1) for n in ("q", "k", "v")}
    before, after = (
        run(case, implementation, **options),
        run(case | changed, implementation, **options),
    )
    assert (before[0, 50:110] == after[0, 50:110]).all()
    assert (before[1] == after[1]).all()
    assert not jnp.allclose(before[0, :50], after[0, :50], atol=1e-2)


def test_what_a_kernel_cannot_do_is_refused(case: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"cudnn cannot do this: it needs bfloat16.*float32"):
        run(case, "cudnn")
    short = {n: x[:, :100] for n, x in case.items()}
    with pytest.raises(ValueError, match=r"splash cannot do this.*multiple of 128, found 100"):
        run(short, "splash")
    with pytest.raises(ValueError, match="'flash' is not known"):
        run(case, "flash")


def test_auto_goes_by_platform_and_shape() -> None:
    def q(t: int, h: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((1, t, 4, h), dtype)

    assert resolve(q(128, 64, jnp.bfloat16), "auto", "cpu") == "chunked"
    assert resolve(q(128, 64, jnp.bfloat16), "auto", "tpu") == "splash"
    assert resolve(q(100, 64, jnp.bfloat16), "auto", "tpu") == "chunked"
    assert resolve(q(128, 64, jnp.bfloat16), "auto", "gpu") == "cudnn"
    assert resolve(q(128, 64, jnp.float32), "auto", "gpu") == "chunked"
    assert resolve(q(128, 60, jnp.bfloat16), "auto", "gpu") == "chunked"


def test_cached_attention_is_the_last_row_of_the_whole(case: dict[str, np.ndarray]) -> None:
    """Slots beyond the new token's hold rubbish, which must not be seen."""
    whole = {n: x[1:] for n, x in case.items()}
    at = 77
    last = cached_attention(
        whole["q"][:, at : at + 1], whole["k"], whole["v"], jnp.array([at], jnp.int32)
    )
    np.testing.assert_allclose(last[0, 0], expected(case)[1, at], atol=2e-6)
