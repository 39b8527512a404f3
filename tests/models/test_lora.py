"""Adapters beside the weights: where they stand, what they add, what merging makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posttrain.config import ConfigError
from posttrain.models import nested
from posttrain.models.adapters import attach, merging
from posttrain.models.dropout import Dropout, set_dropout
from posttrain.models.layers import linear
from posttrain.models.lora import Adapter, LoraConfig
from posttrain.sampling.engine import Engine
from posttrain.sampling.request import Sampling, alike
from tests.models.tiny import mesh_of, open_tiny

PLACES = np.tile(np.arange(24, dtype=np.int32), (8, 1))
TOKENS = np.random.default_rng(0).integers(0, 160, (8, 24)).astype(np.int32)
SEGMENTS = np.where(PLACES < 20, 1, 0).astype(np.int32)


def logits(graph: Any, params: Any) -> np.ndarray:
    model = nnx.merge(graph, nnx.State(params))
    return np.asarray(jax.jit(lambda: model.logits(TOKENS, PLACES, SEGMENTS))())


def flat(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def merged(params: Any, adapter: Adapter, new_ids: range, dtype: Any) -> dict:
    """The base model with all its adapters in it."""
    base, leaf = merging(params, adapter, new_ids, dtype)
    return nested.nested((path, leaf(path, x)) for path, x in nested.flat(base))


def with_adapters(
    folder: Path, mesh: Any, family: str = "llama", new_ids: range = range(0), noise: bool = True,
    **lora: Any,
) -> tuple[Any, dict]:  # fmt: skip
    """(graph, params) of a tiny model whose adapters are not zero."""
    model = open_tiny(folder, family, mesh)
    cfg = LoraConfig(**lora)
    graph, state = attach(model.graph, model.state, cfg, mesh, seed=1, new_ids=new_ids)
    params = nnx.to_pure_dict(state)

    def moved(path: Any, p: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if not noise or ("lora" not in name and "_new" not in name):
            return p
        values = np.random.default_rng(len(name)).normal(0, 0.1, p.shape).astype(np.float32)
        return p + jax.device_put(values, p.sharding)

    return graph, jax.tree_util.tree_map_with_path(moved, params)


def by_hand(params: Any, scale: float, new_ids: range = range(0)) -> dict:
    """The base model with W + scale A B, worked out in float64 by the paper's formula."""
    leaves = {path: np.asarray(x, np.float64) for path, x in flat(params).items()}
    for path, a in leaves.items():
        if path.endswith("_lora_a"):
            base = path.removesuffix("_lora_a")
            b, w = leaves[base + "_lora_b"], leaves[base]
            for layer in range(len(w)):
                rank = a.shape[-1]
                ba = a[layer].reshape(-1, rank) @ b[layer].reshape(rank, -1)
                w[layer] += scale * ba.reshape(w[layer].shape)
    for i, token in enumerate(new_ids):
        leaves["embedding"][token] = leaves["embedding_new"][i]
        if "head" in leaves:
            leaves["head"][:, token] = leaves["head_new"][i]
    out: dict = {}
    for path, x in leaves.items():
        if "_lora_" not in path and not path.endswith("_new"):
            *at, name = path.split("/")
            inner = out
            for key in at:
                inner = inner.setdefault(key, {})
            inner[name] = jnp.asarray(x, jnp.float32)
    return out


def test_fresh_adapters_change_nothing(tmp_path: Path) -> None:
    """B is zero: training starts from the model as it is."""
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        base = open_tiny(tmp_path, "qwen3", mesh)
        graph, params = with_adapters(tmp_path, mesh, "qwen3", range(150, 153), noise=False)
        want = logits(base.graph, nnx.to_pure_dict(base.state))
        np.testing.assert_array_equal(logits(graph, params), want)


@pytest.mark.parametrize(
    ("family", "lora", "scale"),
    [
        ("llama", {"rank": 3, "alpha": 6.0}, 2.0),
        ("qwen3", {"rank": 4, "alpha": 6.0, "rslora": True, "targets": ("o", "mlp/*")}, 3.0),
    ],
)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)])
def test_an_adapter_adds_its_product(
    tmp_path: Path, family: str, lora: dict, scale: float, sizes: tuple[int, int, int]
) -> None:
    """Also merged, and with rows of their own for new tokens (tied head and not)."""
    mesh, new_ids = mesh_of(*sizes), range(150, 153)
    assert (TOKENS == 151).any()
    with jax.set_mesh(mesh):
        graph, params = with_adapters(tmp_path, mesh, family, new_ids, **lora)
        base = open_tiny(tmp_path, family, mesh)
        found = logits(graph, params)
        want = logits(base.graph, by_hand(params, scale, new_ids))
        assert np.abs(want - logits(base.graph, nnx.to_pure_dict(base.state))).max() > 0.1
        np.testing.assert_allclose(found, want, atol=2e-5)
        layouts = {path: x.sharding for path, x in flat(params).items()}
        whole = merged(params, Adapter(scale, 0), new_ids, jnp.float32)
        assert flat(whole).keys() == flat(nnx.to_pure_dict(base.state)).keys()
        assert all(x.sharding == layouts[path] for path, x in flat(whole).items())
        np.testing.assert_allclose(logits(base.graph, whole), found, atol=1e-5)


def test_fresh_adapters_are_the_same_on_every_mesh_and_laid_out_as_the_weights(
    tmp_path: Path,
) -> None:
    found = []
    for sizes in ((1, 1, 1), (1, 4, 2)):
        mesh = mesh_of(*sizes)
        with jax.set_mesh(mesh):
            params = flat(with_adapters(tmp_path, mesh, noise=False, rank=4)[1])
        found.append({path: np.asarray(x) for path, x in params.items() if "lora" in path})
        if sizes != (1, 1, 1):
            for name, spec in {
                "attention/q_lora_a": (None, "fsdp", None),
                "attention/q_lora_b": (None, None, "tensor", None),
                "attention/o_lora_a": (None, "tensor", None, None),
                "attention/o_lora_b": (None, None, "fsdp"),
                "mlp/down_lora_a": (None, "tensor", None),
            }.items():
                assert params[f"layers/0/{name}"].sharding.spec == jax.P(*spec), name
    one, eight = found
    assert len(one) == 14
    for path, array in one.items():
        np.testing.assert_array_equal(eight[path], array, err_msg=path)
        assert array.dtype == np.float32
    q, o = one["layers/0/attention/q_lora_a"], one["layers/0/attention/o_lora_a"]
    assert q.shape == (2, 64, 4)
    assert 0.9 / 8 < np.abs(q).max() <= 1 / 8  # PEFT's kaiming_uniform(a=sqrt(5)): 1 / sqrt(64)
    assert len({x.tobytes() for x in (q, o, one["layers/0/attention/k_lora_a"])}) == 3
    assert not one["layers/0/attention/o_lora_b"].any()


def test_targets_are_patterns_of_matrices(tmp_path: Path) -> None:
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        for targets, names in {
            ("q", "v"): {"q", "v"},
            ("attention/*",): {"q", "k", "v", "o"},
            ("layers/0/mlp/[gu]*",): {"gate", "up"},
            ("q_proj", "mlp.down_proj", "model.layers.*.v_proj"): {"q", "down", "v"},
            "q_proj": {"q"},
            "all-linear": {"q", "k", "v", "o", "gate", "up", "down"},
        }.items():
            params = flat(with_adapters(tmp_path, mesh, targets=targets)[1])
            found = {p.rpartition("/")[2] for p in params if p.endswith("_lora_a")}
            assert found == {f"{name}_lora_a" for name in names}
        with pytest.raises(ConfigError) as error:
            with_adapters(tmp_path, mesh, targets=("q", "query", "head", "*_norm"))
    assert "lora.targets: 'query': no such matrix" in str(error.value)
    assert "lora.targets: 'head': head can have none" in str(error.value)
    assert "'*_norm': " in str(error.value)
    assert "there are: attention/k, attention/o" in str(error.value)


def test_dropout_is_of_what_the_adapter_reads_and_scaled(tmp_path: Path) -> None:
    """With A the identity and B ones, what is added to W x is the sum over kept x / (1 - p)."""
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        lora = {"targets": ("gate",), "rank": 64, "alpha": 64.0, "dropout": 0.25}
        graph, params = with_adapters(tmp_path, mesh, **lora)
    own = params["layers"]["0"]["mlp"]
    own["gate_lora_a"] = jnp.tile(jnp.eye(64), (2, 1, 1))
    own["gate_lora_b"] = jnp.zeros((2, 64, 96)).at[:, jnp.arange(64), jnp.arange(64)].set(1)
    x = jnp.ones((4, 50, 64))

    examples = jnp.broadcast_to(jnp.arange(4)[:, None], (4, 50))
    places = jnp.broadcast_to(jnp.arange(50), (4, 50))

    def added(key: jax.Array | None, layer: int = 1) -> np.ndarray:
        model = nnx.merge(graph, nnx.State(jax.tree.map(lambda p: p[0], params)))
        block = model.layers["0"]
        if key is not None:
            set_dropout(block, Dropout(key, examples, places), layer)
        with_it = linear(block.mlp, "gate", x)
        return np.asarray(with_it - x @ own["gate"][0])[..., :64]

    np.testing.assert_allclose(added(None), 1, atol=1e-5)
    kept = added(jnp.uint32(3))
    np.testing.assert_allclose(np.unique(kept.round(4)), [0, 1.3333])
    assert abs((kept > 0.5).mean() - 0.75) < 0.02
    np.testing.assert_array_equal(added(jnp.uint32(3)), kept)
    seen = (kept > 0.5).astype(np.float64)
    shifted = [np.roll(seen, 1, dim) for dim in range(3)]  # other examples, places, dims
    others = [added(jnp.uint32(4)), added(jnp.uint32(3), layer=2)]
    for other in [*shifted, *((x > 0.5).astype(np.float64) for x in others)]:
        assert abs(np.corrcoef(seen.ravel(), other.ravel())[0, 1]) < 0.04


def test_text_is_the_same_with_adapters_and_merged(tmp_path: Path) -> None:
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        graph, params = with_adapters(tmp_path, mesh, "llama", range(150, 153), rank=4)
        asked = alike([[5, 151, 9], [152, 3]], Sampling(max_new_tokens=8, temperature=0))
        said = Engine(nnx.merge(graph, nnx.State(params)), slots=2).generate(asked)
        base = open_tiny(tmp_path, "llama", mesh)
        whole = merged(params, LoraConfig(rank=4).adapter, range(150, 153), jnp.float32)
        want = Engine(nnx.merge(base.graph, nnx.State(whole)), slots=2).generate(asked)
    assert [c.tokens for (c,) in said] == [c.tokens for (c,) in want]
