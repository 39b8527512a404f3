"""Attention within segments: a float64 definition, and every kernel against the reference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posttrain.models.attention as attention_module
from posttrain.models import splash
from posttrain.models.attention import attention, resolve
from posttrain.models.kv_cache import KEYS, VALUES, cached_attention, to_cache
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


def definition(
    case: dict[str, np.ndarray],
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float = H**-0.5,
) -> dict[str, np.ndarray]:
    """In float64: forward (padding 0), and the gradients of sum(forward * BACK) by hand."""
    ids = case["segments"]
    t = ids.shape[1]
    behind = np.arange(t)[:, None] - np.arange(t)
    seen = (ids[:, :, None] == ids[:, None, :]) & (behind >= 0)
    if window is not None:
        seen &= behind < window
    back = np.cos(np.arange(B * t * N * H)).reshape(B, t, N, H) * (ids > 0)[..., None, None]

    def heads_first(x: np.ndarray, repeat: int = 1) -> np.ndarray:
        return np.repeat(x.astype(np.float64), repeat, axis=2).swapaxes(1, 2)

    q, back = heads_first(case["q"]), heads_first(back)
    k, v = (heads_first(case[name], N // K) for name in ("k", "v"))
    raw = q @ k.swapaxes(2, 3) * scale
    capped = raw if softcap is None else softcap * np.tanh(raw / softcap)
    slope = 1.0 if softcap is None else 1 - (capped / softcap) ** 2
    scores = np.where(seen[:, None], capped, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_p = back @ v.swapaxes(2, 3)
    d_raw = p * (d_p - (d_p * p).sum(-1, keepdims=True)) * slope * scale

    def grouped(x: np.ndarray) -> np.ndarray:
        return x.reshape(B, K, N // K, t, H).sum(2).swapaxes(1, 2)

    return {
        "forward": (p @ v).swapaxes(1, 2) * (ids > 0)[..., None, None],
        "q": (d_raw @ k).swapaxes(1, 2),
        "k": grouped(d_raw.swapaxes(2, 3) @ q),
        "v": grouped(p.swapaxes(2, 3) @ back),
    }


def computed(case: dict[str, Any], implementation: str, **options: Any) -> dict[str, jax.Array]:
    """What definition gives, by an implementation."""
    real = jnp.asarray(case["segments"] > 0, jnp.float32)[..., None, None]

    @jax.jit
    def both(q: Any, k: Any, v: Any) -> Any:
        def forward(q: Any, k: Any, v: Any) -> jax.Array:
            return run(case | {"q": q, "k": k, "v": v}, implementation, **options) * real

        out, pull = jax.vjp(forward, q, k, v)
        return out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    found = both(case["q"], case["k"], case["v"])
    return dict(zip(("forward", "q", "k", "v"), found, strict=True))


def assert_right(found: dict[str, Any], want: dict[str, np.ndarray]) -> None:
    for name, right in want.items():
        np.testing.assert_allclose(found[name], right, atol=2e-5, err_msg=name)


def expected(case: dict[str, np.ndarray]) -> np.ndarray:
    return definition(case)["forward"]


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
        np.testing.assert_allclose(found[name], grad, atol=2e-6 * np.abs(grad).max(), err_msg=name)


def test_chunked_needs_half_of_the_references_memory() -> None:
    def temporary(implementation: str) -> int:
        q = jax.ShapeDtypeStruct((1, 2048, 4, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

        def f(q, k, v, s):
            return attention(q, k, v, s, implementation=implementation).sum()

        return (
            jax.jit(jax.grad(f)).lower(q, q, q, ids).compile().memory_analysis().temp_size_in_bytes
        )

    assert temporary("chunked") < temporary("reference") * 0.55


RULES: dict[str, dict[str, Any]] = {
    "all": {},
    "itself": {"window": 1},
    "window": {"window": 40},
    "wide": {"window": 500},
    "cap": {"softcap": 1.5},
    "scale": {"scale": 0.7},
    "gemma2": {"window": 25, "softcap": 2.0, "scale": 0.4},
}


@pytest.fixture(scope="module")
def long_case() -> dict[str, np.ndarray]:
    """Two of splash's blocks a row, segments that cross their border, and padding."""
    rng = np.random.default_rng(1)
    t = 256
    segments = np.zeros((B, t), np.int32)
    segments[0, :101], segments[0, 101:230] = 1, 2
    segments[1] = 1
    shapes = {"q": N, "k": K, "v": K}
    arrays = {name: rng.normal(size=(B, t, n, H)).astype(np.float32) for name, n in shapes.items()}
    return arrays | {"segments": segments}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_windows_soft_caps_and_scales_are_the_definitions_with_gradients(
    case: dict[str, np.ndarray], implementation: str, rules: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "_CHUNK", 37)
    found = computed(case, implementation, **RULES[rules])
    assert_right(found, definition(case, **RULES[rules]))


@pytest.mark.parametrize("rules", ["itself", "gemma2"])
def test_splash_honours_windows_soft_caps_and_scales(
    long_case: dict[str, np.ndarray], rules: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """window 1 leaves a block that no query sees; gemma2 one that some see in part."""
    monkeypatch.setattr(splash, "_BLOCK", 128)
    found = computed(long_case, "splash", interpret=True, **RULES[rules])
    assert_right(found, definition(long_case, **RULES[rules]))


@pytest.mark.parametrize("rules", ["all", "gemma2"])
@pytest.mark.parametrize("implementation", ["reference", "chunked", "splash"])
def test_rows_cut_over_context_are_whole_rows(
    long_case: dict[str, np.ndarray],
    implementation: str,
    rules: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two devices hold a row; chunks of 37 queries of them, whose windows cross to the other."""
    monkeypatch.setattr(attention_module, "_CHUNK", 37)
    options = {"interpret": True} if implementation == "splash" else {}
    with jax.set_mesh(mesh_of(1, 2, 2, context=2)):
        found = computed(long_case, implementation, **options, **RULES[rules])
    assert_right(found, definition(long_case, **RULES[rules]))


def test_context_is_refused_where_it_cannot_be() -> None:
    q = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
    assert resolve(q, "auto", "tpu", context=2) == "splash"
    assert resolve(q, "auto", "tpu", context=4) == "chunked"
    assert resolve(q, "auto", "gpu", context=2) == "chunked"
    with pytest.raises(ValueError, match=r"multiple of 128 for each of mesh.context=4 devices"):
        resolve(q, "splash", "tpu", context=4)
    with pytest.raises(ValueError, match=r"whole rows, and mesh.context=2 cuts them"):
        resolve(q, "cudnn", "gpu", context=2)


def test_chunked_touches_no_key_before_the_window() -> None:
    """16 chunks of 128 queries: 136 blocks of scores without a window, 31 with one."""

    def flops(window: int | None) -> float:
        q = jax.ShapeDtypeStruct((1, 2048, 4, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

        def f(q, s):
            return attention(q, q, q, s, implementation="chunked", window=window)

        return jax.jit(f).lower(q, ids).compile().cost_analysis()["flops"]

    assert flops(128) < 0.3 * flops(None)


def test_cudnn_takes_no_soft_cap() -> None:
    q = jax.ShapeDtypeStruct((1, 128, 4, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"cudnn cannot do this: it knows no soft cap.*\(50\)"):
        resolve(q, "cudnn", "gpu", softcap=50.0)
    assert resolve(q, "auto", "gpu", softcap=50.0) == "chunked"
    assert resolve(q, "auto", "tpu", softcap=50.0) == "splash"


def test_a_window_of_nothing_is_refused(case: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="window is 0, expected at least 1"):
        run(case, "reference", window=0)
    with pytest.raises(ValueError, match="softcap is 0, expected more than 0"):
        run(case, "reference", softcap=0)


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
        np.testing.assert_allclose(found[name], grad, atol=2e-6 * np.abs(grad).max(), err_msg=name)


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


@pytest.mark.parametrize("rules", RULES)
def test_cached_attention_is_the_last_row_of_the_whole(
    case: dict[str, np.ndarray], rules: str
) -> None:
    """Slots beyond the new token's hold rubbish, which must not be seen."""
    whole = {n: x[1:] for n, x in case.items()}
    at, window = 77, RULES[rules].get("window")
    q, where = whole["q"][:, at : at + 1], jnp.array([at], jnp.int32)
    k, v = (
        to_cache(whole[name], where + 1, window, dim) for name, dim in (("k", KEYS), ("v", VALUES))
    )
    last = cached_attention(q, k, v, where, jnp.int32(at + 1), **RULES[rules])
    want = definition(case, **RULES[rules])["forward"][1, at]
    np.testing.assert_allclose(last[0, 0], want, atol=2e-6)
