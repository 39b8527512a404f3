"""The vocabulary head: against a float64 formula, against plain logits, and by its HLO."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain.models.head import budget_overflow, token_outputs
from posttrain.sharding import BATCH_AXES
from tests.models.hlo import collectives
from tests.models.tiny import MESHES, mesh_of

B, T, D, V, REAL = 8, 24, 16, 48, 43  # V - REAL columns are padding


@pytest.fixture(scope="module")
def case() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    segments = np.zeros((B, T), np.int32)
    segments[:, :9], segments[:, 9:20] = 1, 2
    weights = rng.choice([0.0, 0.5, 1.0], (B, T), p=[0.5, 0.2, 0.3]).astype(np.float32)
    weights[3] = 0  # a row without a trained token
    return {
        "h": rng.normal(size=(B, T, D)).astype(np.float32),
        "w": rng.normal(size=(D, V)).astype(np.float32),
        "tokens": rng.integers(0, REAL, (B, T)).astype(np.int32),
        "segments": segments,
        "weights": weights,
    }


def run(case: dict[str, Any], mesh: jax.sharding.Mesh, **options: Any) -> Any:
    options = {"budget": B * T, "chunk": 16, "vocab_size": REAL} | options
    return token_outputs(
        case["h"],
        case["w"],
        case["tokens"],
        case["segments"],
        case["weights"],
        mesh=mesh,
        **options,
    )


def expected(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The definition, one position after another, in float64."""
    h, w = case["h"].astype(np.float64), case["w"][:, :REAL].astype(np.float64)
    out = {name: np.zeros((B, T)) for name in ("logps", "entropy", "correct")}
    for b in range(B):
        for t in range(1, T):
            segment = case["segments"][b, t]
            if not segment or segment != case["segments"][b, t - 1] or not case["weights"][b, t]:
                continue
            z = h[b, t - 1] @ w
            p = np.exp(z - z.max())
            p /= p.sum()
            out["logps"][b, t] = np.log(p[case["tokens"][b, t]])
            out["entropy"][b, t] = -(p * np.log(p)).sum()
            out["correct"][b, t] = z.argmax() == case["tokens"][b, t]
    return out


CUT = (1, 2, 1, 1, 4)  # rows cut over context: 6 positions each, a segment's target on the next


@pytest.mark.parametrize("shape", [*MESHES, CUT])
def test_equals_the_float64_formula(case: dict[str, np.ndarray], shape: tuple[int, ...]) -> None:
    found = jax.jit(lambda c: run(c, mesh_of(*shape), entropy=True, correct=True))(case)
    for name, want in expected(case).items():
        np.testing.assert_allclose(getattr(found, name), want, atol=2e-5, err_msg=name)
    assert np.asarray(found.correct).sum() > 0


def test_values_not_asked_for_are_not_computed(case: dict[str, np.ndarray]) -> None:
    found = run(case, mesh_of(1, 1, 1))
    assert found.entropy is None
    assert found.correct is None


def full_logits_loss(h: jax.Array, w: jax.Array, case: dict[str, np.ndarray]) -> jax.Array:
    logp = jax.nn.log_softmax(h @ w[:, :REAL])
    picked = jnp.take_along_axis(logp[:, :-1], case["tokens"][:, 1:, None], 2)[..., 0]
    entropy = -(jnp.exp(logp) * logp).sum(-1)[:, :-1]
    seg = case["segments"]
    on = (seg[:, 1:] == seg[:, :-1]) & (seg[:, 1:] > 0) & (case["weights"][:, 1:] != 0)
    return -(on * case["weights"][:, 1:] * picked).sum() + 0.3 * (on * entropy).sum()


@pytest.mark.parametrize(
    ("shape", "columns"),
    # 46 columns are no multiple of 4 or 8: then the head is whole on every device of `tensor`
    [
        ((1, 1, 1), V),
        ((2, 4, 1), V),
        ((2, 2, 2), V),
        ((1, 1, 8), V),
        ((1, 1, 8), 46),
        (CUT, V),
        ((1, 4, 2, 1, 1, 2), V),
    ],  # fsdp over two axes
)
def test_gradients_equal_those_of_full_logits(
    case: dict[str, np.ndarray], shape: tuple[int, ...], columns: int
) -> None:
    mesh = mesh_of(*shape)

    def loss(h: jax.Array, w: jax.Array) -> jax.Array:
        out = run(case | {"h": h, "w": w}, mesh, entropy=True)
        return -(out.logps * case["weights"]).sum() + 0.3 * out.entropy.sum()

    w = case["w"][:, :columns]
    want, (dh, dw) = jax.value_and_grad(full_logits_loss, (0, 1))(case["h"], w, case)
    found, (gh, gw) = jax.jit(jax.value_and_grad(loss, (0, 1)))(case["h"], w)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    np.testing.assert_allclose(gh, dh, atol=2e-5)
    np.testing.assert_allclose(gw, dw, atol=5e-5)
    assert not np.asarray(gw)[:, REAL:].any(), "padding columns have no gradient"


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_pitfall_23_a_temperature_divides_the_logits(
    case: dict[str, np.ndarray], softcap: float | None
) -> None:
    """The capped ones; of values, entropies and gradients, against plain logits over it."""
    temperature = 0.6

    def loss(h: jax.Array, w: jax.Array) -> jax.Array:
        options = {"entropy": True, "temperature": temperature, "softcap": softcap}
        out = run(case | {"h": h, "w": w}, mesh_of(2, 2, 2), **options)
        return -(out.logps * case["weights"]).sum() + 0.3 * out.entropy.sum()

    def plain(h: jax.Array, w: jax.Array) -> jax.Array:
        z = h @ w[:, :REAL]
        z = softcap * jnp.tanh(z / softcap) if softcap else z
        # logits that are what they should be already: an identity is their kernel
        return full_logits_loss(z / temperature, jnp.eye(REAL), case)

    want, (dh, dw) = jax.value_and_grad(plain, (0, 1))(case["h"], case["w"])
    found, (gh, gw) = jax.jit(jax.value_and_grad(loss, (0, 1)))(case["h"], case["w"])
    np.testing.assert_allclose(found, want, rtol=1e-5)
    np.testing.assert_allclose(gh, dh, atol=5e-5)
    np.testing.assert_allclose(gw, dw, atol=1e-4)


def test_budget_is_per_shard_and_overflow_is_loud(case: dict[str, np.ndarray]) -> None:
    """A shard with more trained tokens than slots: NaN there, and the surplus is counted."""
    seg = case["segments"]
    trained = (seg[:, 1:] == seg[:, :-1]) & (seg[:, 1:] > 0) & (case["weights"][:, 1:] != 0)
    counts = trained.reshape(4, -1).sum(1)
    mesh = mesh_of(1, 4, 2)
    exact = run(case, mesh, budget=int(counts.max()), chunk=4)
    np.testing.assert_allclose(exact.logps, expected(case)["logps"], atol=2e-5)

    budget = int(counts.max()) - 8  # below, by more than the rounding to whole chunks of 8
    short = np.asarray(run(case, mesh, budget=budget, chunk=8).logps).reshape(4, -1)
    slots = -(-budget // 8) * 8
    assert (np.isnan(short).any(1) == (counts > slots)).all()
    assert (counts > slots).any()
    assert not (counts > slots).all()
    surplus = budget_overflow(seg, case["weights"], mesh=mesh, budget=budget, chunk=8)
    assert int(surplus) == np.maximum(counts - slots, 0).sum()
    full = {"mesh": mesh, "budget": int(counts.max()), "chunk": 8}
    assert int(budget_overflow(seg, case["weights"], **full)) == 0


def test_rows_that_the_mesh_does_not_divide_are_refused(case: dict[str, np.ndarray]) -> None:
    odd = {k: v[:6] if k != "w" else v for k, v in case.items()}
    with pytest.raises(ValueError, match="6 rows do not divide over 8 shards"):
        run(odd, mesh_of(2, 4, 1))


def test_pitfall_15_first_token_of_a_segment_is_predicted_by_nothing(
    case: dict[str, np.ndarray],
) -> None:
    found = run(case | {"weights": np.ones((B, T), np.float32)}, mesh_of(1, 1, 1))
    logps = np.asarray(found.logps)
    assert not logps[:, [0, 9]].any()  # first of row and of segment 2
    assert not logps[:, 20:].any()  # padding, whatever its weight
    assert (np.delete(logps[:, :20], [0, 9], axis=1) < 0).all()


def test_gradient_of_the_kernel_adds_up_in_float32() -> None:
    """bfloat16 weights, many chunks that each add little: a bfloat16 sum would lose them."""
    n = 2048
    h = jnp.ones((1, n + 1, 8), jnp.bfloat16)
    w = jnp.zeros((8, 128), jnp.float32)
    args = (jnp.zeros((1, n + 1), jnp.int32), jnp.ones((1, n + 1), jnp.int32), jnp.ones((1, n + 1)))

    def loss(w: jax.Array) -> jax.Array:
        options = {"mesh": mesh_of(1, 1, 1), "budget": n, "chunk": 8, "vocab_size": 128}
        return token_outputs(h, w, *args, **options).logps.sum()

    grad = np.asarray(jax.jit(jax.grad(loss))(w))
    p = float(jnp.bfloat16(1 / 128))
    np.testing.assert_allclose(grad[:, 1:], -n * p, rtol=1e-6)


def compiled(shape: tuple[int, ...], head: Any, tokens: int, d: int, v: int) -> Any:
    """loss and gradients of `head`, compiled for a mesh: h [8, tokens / 8, d], w [d, v]."""
    mesh = mesh_of(*shape)

    def make(dims: tuple[int, ...], dtype: Any, spec: P) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    rows = P(BATCH_AXES)
    h = make((8, tokens // 8, d), jnp.bfloat16, rows)
    w = make((d, v), jnp.float32, P("fsdp", "tensor"))
    ints, floats = (make((8, tokens // 8), t, rows) for t in (jnp.int32, jnp.float32))
    grads = jax.jit(jax.value_and_grad(lambda *a: head(mesh, *a), (0, 1)))
    with jax.set_mesh(mesh):
        return grads.lower(h, w, ints, ints, floats).compile()


def chunked_head(mesh: Any, h: Any, w: Any, tokens: Any, segments: Any, weights: Any) -> Any:
    budget = tokens.size // (mesh.shape["data"] * mesh.shape["fsdp"])
    options = {"mesh": mesh, "budget": budget, "chunk": 256, "vocab_size": w.shape[1]}
    return token_outputs(h, w, tokens, segments, weights, **options).logps.sum()


def scanned_head(mesh: Any, h: Any, w: Any, tokens: Any, segments: Any, weights: Any) -> Any:
    """What the compiler makes of a plain scan over chunks: the wrong version."""
    chunks = (h.reshape(-1, 256, h.shape[-1]), tokens.reshape(-1, 256))

    @jax.checkpoint
    def body(total: Any, chunk: Any) -> Any:
        logp = jax.nn.log_softmax((chunk[0] @ w.astype(h.dtype)).astype(jnp.float32))
        return total + jnp.take_along_axis(logp, chunk[1][:, None], 1).sum(), None

    return jax.lax.scan(body, jnp.float32(0), chunks)[0]


@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 4, 2)])
def test_no_collective_in_the_loop_but_over_tensor(shape: tuple[int, ...]) -> None:
    found = collectives(compiled(shape, chunked_head, 8192, 64, 512).as_text())
    mesh_ids = np.arange(8).reshape(shape)
    over_tensor = sorted(map(tuple, mesh_ids.reshape(-1, shape[2])))
    looped = [c for c in found if c.in_loop]
    for collective in looped:
        assert sorted(map(tuple, collective.groups())) == over_tensor, collective.line
    assert bool(looped) == (shape[2] > 1)
    outside = [c.op for c in found if not c.in_loop]
    assert "all-gather" in outside
    assert "reduce-scatter" in outside


def test_the_hlo_test_sees_collectives_in_a_plain_scan() -> None:
    found = collectives(compiled((2, 4, 1), scanned_head, 8192, 64, 512).as_text())
    assert any(c.in_loop for c in found)


def test_memory_does_not_grow_with_logits() -> None:
    """Temp memory of 4096 more tokens: under 2% of their float32 logits."""
    d, v = 256, 32768
    few, many = (
        compiled((1, 1, 1), chunked_head, n, d, v).memory_analysis().temp_size_in_bytes
        for n in (2048, 6144)
    )
    growth = (many - few) / (4096 * v * 4)
    print(f"head temp growth: {growth:.2%} of the logits' {4096 * v * 4 / 2**20:.0f} MiB")
    assert growth < 0.02
