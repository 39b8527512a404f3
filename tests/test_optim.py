"""Schedules and optimisers against formulas written out in float64 numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from posttrain import optim, sharding
from posttrain.optim import OptimConfig


def rates(total: int = 100, **keys) -> np.ndarray:
    rate = optim.schedule(OptimConfig(lr=2.0, **keys), total)
    return np.array([float(rate(k)) for k in range(total)])


def test_constant_schedule_after_warmup() -> None:
    got = rates(schedule="constant", warmup=4)
    np.testing.assert_allclose(got[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    assert (got[4:] == 2.0).all()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"warmup": 100}, "warm-up of 100 steps is longer than the run's 10: it ends at 10.0%"),
        ({"schedule": "wsd", "warmup": 6, "decay": 8}, "do not fit 10 steps: the decay gets 4"),
        ({"warmup": 10}, None),
        ({"warmup": 15, "schedule_steps": 20}, "longer than the run's 10"),
        ({"schedule": "wsd", "warmup": 2, "decay": 8}, None),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_said(keys: dict, said: str | None) -> None:
    found = optim.warnings(OptimConfig(**keys), 10)
    assert len(found) == (said is not None)
    assert not said or said in found[0]


def test_warmup_below_one_is_a_fraction_of_the_steps() -> None:
    np.testing.assert_allclose(rates(warmup=0.1), rates(warmup=10))


def test_linear_and_cosine_schedules_follow_their_formulas() -> None:
    k = np.arange(10, 100, dtype=np.float64)
    done = (k - 10) / 90
    linear = 2 * (0.1 + 0.9 * (1 - done))
    cosine = 2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * done)))
    keys = {"warmup": 10, "min_lr_ratio": 0.1}
    np.testing.assert_allclose(rates(schedule="linear", **keys)[10:], linear, rtol=1e-5)
    np.testing.assert_allclose(rates(schedule="cosine", **keys)[10:], cosine, rtol=1e-5)


def test_wsd_is_flat_then_falls_over_its_last_steps() -> None:
    got = rates(schedule="wsd", warmup=0, decay=0.2)
    assert (got[:81] == 2.0).all()
    np.testing.assert_allclose(got[81:], 2 * (1 - np.arange(1, 20) / 20), rtol=1e-5)


def test_an_extended_run_keeps_the_schedule_it_named() -> None:
    short = rates(schedule="cosine", schedule_steps=50)
    assert short[49] > 0
    np.testing.assert_allclose(short[50:], 0, atol=1e-7)


def params_on(mesh: jax.sharding.Mesh) -> dict:
    rng = np.random.default_rng(0)
    shapes = {
        "final_norm": ((16,), P()),
        "embedding": ((32, 16), P(None, "fsdp")),
        "layers": {
            "attention": {
                "q": ((3, 16, 2, 8), P(None, "fsdp")),
                "q_bias": ((3, 2, 8), P()),
                "o": ((3, 2, 8, 16), P(None, None, None, "fsdp")),
            },
            "mlp": {"up": ((3, 16, 24), P(None, "fsdp"))},
            "moe": {"up": ((3, 4, 16, 24), P(None, None, "fsdp"))},
        },
    }

    def put(leaf):
        return jax.device_put(
            rng.normal(size=leaf[0]).astype(np.float32), jax.sharding.NamedSharding(mesh, leaf[1])
        )

    return jax.tree.map(put, shapes, is_leaf=lambda x: isinstance(x, tuple))


@pytest.fixture(scope="module")
def params() -> dict:
    return params_on(sharding.make_mesh(sharding.MeshConfig(fsdp=8)))


def one_update(cfg: OptimConfig, params: dict, grads: dict) -> dict:
    tx = optim.make_optimizer(cfg, 10)
    updates, _ = jax.jit(tx.update)(grads, optim.init_state(tx, params), params)
    return updates


def test_adamw_decays_matrices_but_not_norms_and_biases(params: dict) -> None:
    """Loshchilov & Hutter 2019, algorithm 2, first update: -lr (g / (|g| + eps) + wd * p)."""
    cfg = OptimConfig(lr=0.1, schedule="constant", warmup=0, weight_decay=0.5)
    grads = jax.tree.map(lambda p: jnp.cos(p), params)
    updates = one_update(cfg, params, grads)

    def expected(p: jax.Array, g: jax.Array, decayed: bool) -> np.ndarray:
        p, g = np.asarray(p, np.float64), np.asarray(g, np.float64)
        return -0.1 * (g / (np.abs(g) + 1e-8) + 0.5 * p * decayed)

    for path, decayed in {
        ("embedding",): True,
        ("final_norm",): False,
        ("layers", "attention", "q"): True,
        ("layers", "attention", "q_bias"): False,
    }.items():
        p, g, u = params, grads, updates
        for key in path:
            p, g, u = p[key], g[key], u[key]
        # 1 - 0.999 in float32 is off by 5e-6 of itself: an update of 0.1 by 7e-7
        np.testing.assert_allclose(u, expected(p, g, decayed), atol=2e-6, err_msg=str(path))


def test_decay_all_reaches_norms(params: dict) -> None:
    cfg = OptimConfig(lr=0.1, schedule="constant", warmup=0, weight_decay=0.5, decay_all=True)
    updates = one_update(cfg, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(updates["final_norm"], -0.05 * params["final_norm"], rtol=1e-5)


def test_muon_makes_each_layers_matrix_orthogonal_by_itself(params: dict) -> None:
    """Of G = U S V', Muon's update has singular values near one (Newton-Schulz, 5 steps)."""
    cfg = OptimConfig(type="muon", lr=1.0, schedule="constant", warmup=0, momentum=0.0)
    grads = jax.tree.map(lambda p: p * 1.0, params)
    grads["layers"]["mlp"]["up"] = (
        grads["layers"]["mlp"]["up"] * jnp.array([1.0, 100.0, 1e-2])[:, None, None]
    )
    updates = one_update(cfg, params, grads)
    scale = 0.2 * np.sqrt(24)  # consistent RMS: 0.2 sqrt(max(in, out))
    for name, matrix in {
        "up": np.asarray(updates["layers"]["mlp"]["up"]),
        "experts' up": np.asarray(updates["layers"]["moe"]["up"]),
        "q": np.asarray(updates["layers"]["attention"]["q"]).reshape(3, 16, 16),
        "o": np.asarray(updates["layers"]["attention"]["o"]).reshape(3, 16, 16),
    }.items():
        singular = np.linalg.svd(matrix, compute_uv=False)
        size = scale if "up" in name else 0.2 * 4
        assert (singular > 0.3 * size).all(), (name, singular / size)
        assert (singular < 1.4 * size).all(), (name, singular / size)
    # what is no matrix of a layer goes through Adam: first update -lr g / (|g| + eps)
    np.testing.assert_allclose(
        updates["embedding"], -np.sign(np.asarray(params["embedding"])), rtol=1e-3
    )


def test_adafactor_goes_downhill_and_decays(params: dict) -> None:
    cfg = OptimConfig(type="adafactor", lr=0.01, schedule="constant", warmup=0, weight_decay=0.5)
    grads = jax.tree.map(lambda p: p * 1.0, params)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, decay = one_update(cfg, params, grads), one_update(cfg, params, still)
    assert (np.sign(updates["embedding"]) == -np.sign(params["embedding"])).mean() > 0.99
    np.testing.assert_allclose(decay["embedding"], -0.005 * params["embedding"], rtol=1e-4)
    np.testing.assert_allclose(decay["final_norm"], 0, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_state_is_float32_and_laid_out_like_bfloat16_parameters(kind: str, params: dict) -> None:
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tx = optim.make_optimizer(OptimConfig(type=kind, lr=0.1), 10)
    made = jax.tree.leaves(optim.init_state(tx, low))
    assert {leaf.dtype for leaf in made} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    if kind != "adafactor":  # it has no leaf of a parameter's shape below its size of factoring
        assert [x for x in made if x.shape == (32, 16) and x.sharding.spec == P(None, "fsdp")]


def test_moment_dtype_stores_the_first_moment_alone(params: dict) -> None:
    tx = optim.make_optimizer(OptimConfig(lr=0.1, moment_dtype="bfloat16"), 10)
    dtypes = [x.dtype.name for x in jax.tree.leaves(optim.init_state(tx, params))]
    assert dtypes.count("bfloat16") == len(jax.tree.leaves(params))
    assert dtypes.count("float32") >= len(jax.tree.leaves(params))
