"""Quantised frozen matrices: against the paper's rule in float64 numpy, and what they take up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posttrain import sharding
from posttrain.config import ConfigError
from posttrain.models.adapters import adapt
from posttrain.models.lora import LoraConfig, is_adapter
from posttrain.models.nested import flat, nested
from posttrain.models.quantized import dense, is_quantized, quantize
from tests.models.test_lora import logits, merged
from tests.models.tiny import mesh_of, open_tiny

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0]
)  # fmt: skip
"""QLoRA (Dettmers et al. 2023), appendix E."""


def by_hand(q: Any) -> np.ndarray:
    """Codes and scales -> values, in float64."""
    codes, scales = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q.qvalue, q.scale))
    for dim, (n, m) in enumerate(zip(codes.shape, scales.shape, strict=True)):
        scales = scales.repeat(n // m, dim)
    return (NF4[codes.astype(int)] if q.qtype == "nf4" else codes) * scales


@pytest.mark.parametrize(("kind", "error", "bits"), [("nf4", 0.1, 4.5), ("int8", 0.01, 8.5)])
@pytest.mark.parametrize(("path", "shape", "in_dims"), [
    ("layers/0/attention/q", (2, 256, 4, 16), 1),
    ("layers/0/attention/o", (2, 4, 48, 128), 2),
])  # fmt: skip
def test_values_are_the_nearest_that_there_are_and_take_few_bits(
    kind: str, error: float, bits: float, path: str, shape: tuple[int, ...], in_dims: int
) -> None:
    w = np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32)
    axes = ("layers", "embed", "heads", "head_dim")
    axes = axes if in_dims == 1 else ("layers", "heads", "head_dim", "embed")
    mesh = mesh_of(1, 4, 2)
    with jax.set_mesh(mesh):
        layout = sharding.named_sharding(mesh, axes, shape)
        found = quantize(path, jax.device_put(w, layout), axes, kind)
        values = np.asarray(jax.jit(lambda q: dense(q, jnp.float32))(found))
        held = jax.jit(lambda q: q).lower(found).compile().memory_analysis()
    assert found.qvalue.sharding.spec == layout.spec
    np.testing.assert_allclose(values, by_hand(found), rtol=1e-6, atol=1e-9)
    block = 64 if in_dims == 1 else 48
    rows = np.moveaxis(np.asarray(w, np.float64), in_dims, -1)
    rows = rows.reshape(*rows.shape[:-1], -1, block)
    got = np.moveaxis(np.asarray(values, np.float64), in_dims, -1).reshape(rows.shape)
    top = np.abs(rows).max(-1, keepdims=True)
    grid = NF4 if kind == "nf4" else np.arange(-127, 128) / 127.5
    nearest = np.abs((rows / top)[..., None] - grid).min(-1)
    assert (np.abs(got - rows) / top <= nearest + 1e-6).all()
    assert np.sqrt(np.mean((values - w) ** 2)) < error * w.std()
    bits += 32 / block - 0.5
    # of 8 devices one's share
    assert held.argument_size_in_bytes == pytest.approx(w.size / 8 * bits / 8, rel=0.01)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)])
def test_a_model_computes_with_those_values(
    tmp_path: Path, kind: Any, sizes: tuple[int, int, int]
) -> None:
    """Embedding, head, norms stay as they are; merged, the same values are the base's."""
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        base = open_tiny(tmp_path, "llama", mesh)
        cfg = LoraConfig(rank=4, quantize=kind)
        graph, state = adapt(base.graph, base.state, cfg, mesh, seed=1)
        params = nnx.to_pure_dict(state)
        quantised = {path for path, x in flat(params) if is_quantized(x)}
        assert len(quantised) == 7
        assert all(path.startswith("layers/0/") and "norm" not in path for path in quantised)
        want = nested(
            (p, jnp.asarray(by_hand(x) if p in quantised else np.asarray(x), jnp.float32))
            for p, x in flat(params)
            if not is_adapter(p)
        )
        expected = logits(base.graph, want)
        np.testing.assert_allclose(logits(graph, params), expected, atol=2e-5)
        dense_again = merged(params, cfg.adapter, range(0), jnp.float32)
        np.testing.assert_allclose(logits(base.graph, dense_again), expected, atol=2e-5)


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"pip install 'posttrain\[qlora\]'"):
        quantize("layers/0/mlp/up", jnp.ones((1, 64, 8)), ("layers", "embed", "mlp"), "nf4")
