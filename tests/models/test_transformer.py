"""The decoder: the same numbers packed or not, on any mesh, under any remat policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posttrain.models.hf import Model, flat_params
from posttrain.models.spec import RematName
from posttrain.models.transformer import REMAT
from tests.models.tiny import CONFIGS, mesh_of, open_tiny


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """8 packed rows of 24: segments of 7, 11 and 3, then padding."""
    rng = np.random.default_rng(0)
    lengths = [7, 11, 3]
    segments = np.repeat([1, 2, 3, 0], [*lengths, 3]).astype(np.int32)
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(3)]).astype(np.int32)
    tokens = rng.integers(0, 160, (8, 24)).astype(np.int32)
    return tokens, np.tile(positions, (8, 1)), np.tile(segments, (8, 1))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_packed_segments_equal_rows_of_their_own(
    tmp_path: Path, name: str, rows: tuple[np.ndarray, ...]
) -> None:
    tokens, positions, segments = rows
    model = open_tiny(tmp_path, name, mesh_of(1, 1, 1))
    compiled = jax.jit(lambda state, *rows: nnx.merge(model.graph, state).hidden(*rows))

    def hidden(*rows: np.ndarray) -> np.ndarray:
        return np.asarray(compiled(model.state, *rows))

    packed = hidden(tokens, positions, segments)
    for segment in (1, 2, 3):
        at = segments[0] == segment
        alone = np.zeros((8, 24), np.int32)
        alone[:, : at.sum()] = tokens[:, at]
        own = hidden(alone, np.tile(np.arange(24, dtype=np.int32), (8, 1)), np.ones_like(alone))
        np.testing.assert_allclose(packed[:, at], own[:, : at.sum()], atol=1e-5)
    assert packed[:, segments[0] > 0].std() > 0.1


def loss(state: Any, graph: Any, rows: tuple[np.ndarray, ...]) -> jax.Array:
    """A loss over all logits: no head, no mesh in it."""
    logp = jax.nn.log_softmax(nnx.merge(graph, state).logits(*rows))
    picked = jnp.take_along_axis(logp[:, :-1], jnp.asarray(rows[0])[:, 1:, None], 2)[..., 0]
    return -(picked * (rows[2] > 0)[:, 1:]).sum()


def loss_and_grads(model: Model, rows: tuple[np.ndarray, ...]) -> tuple[Any, dict[str, np.ndarray]]:
    value, grads = jax.jit(jax.value_and_grad(lambda s: loss(s, model.graph, rows)))(model.state)
    return value, {path: np.asarray(g) for path, g in flat_params(grads)}


def assert_same(found: Any, want: Any) -> None:
    np.testing.assert_allclose(found[0], want[0], rtol=1e-6)
    for path, grad in want[1].items():
        gap = np.linalg.norm(found[1][path] - grad) / np.linalg.norm(grad)
        assert gap < 5e-6, (path, gap)


@pytest.fixture(scope="module")
def on_one_device(
    tmp_path_factory: pytest.TempPathFactory, rows: tuple[np.ndarray, ...]
) -> tuple[Any, dict[str, np.ndarray]]:
    model = open_tiny(tmp_path_factory.mktemp("one"), "qwen3", mesh_of(1, 1, 1))
    return loss_and_grads(model, rows)


def test_more_devices_than_heads_give_the_same_weights_loss_and_gradients(
    tmp_path: Path, rows: tuple[np.ndarray, ...], on_one_device: Any
) -> None:
    """tensor=8 divides neither the 4 heads nor the 2 KV heads: those stay whole. Two devices on
    each axis: tests/models/test_families.py."""
    mesh = mesh_of(1, 1, 8)
    with jax.set_mesh(mesh):
        model = open_tiny(tmp_path, "qwen3", mesh)
        found = loss_and_grads(model, rows)
    assert_same(found, on_one_device)
    layout = dict(flat_params(model.state))["layers/0/mlp/gate"].sharding.spec
    assert layout == jax.sharding.PartitionSpec(None, None, "tensor")


@pytest.mark.parametrize("remat", sorted(set(REMAT) - {"none"}))
def test_remat_changes_nothing_but_memory(
    tmp_path: Path, rows: tuple[np.ndarray, ...], on_one_device: Any, remat: str
) -> None:
    model = open_tiny(tmp_path, "qwen3", mesh_of(1, 1, 1), remat=remat)
    assert_same(loss_and_grads(model, rows), on_one_device)


def test_every_remat_name_of_the_config_is_a_policy() -> None:
    assert set(get_args(RematName)) == set(REMAT)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_remat_keeps_what_it_says_and_no_weights(
    tmp_path: Path, name: str, rows: tuple[np.ndarray, ...]
) -> None:
    """none: q, k, v, attention, its projection, gate and up of each token beside full's inputs, of
    a mixture the router's logits and each chosen expert's gate, up and down; attention: its result
    alone."""
    kept, spec = {}, None
    for remat in ("none", "full", "attention"):
        model = open_tiny(tmp_path, name, mesh_of(1, 1, 1), remat=remat)
        spec = model.spec

        def hidden(state: Any, graph: Any = model.graph) -> Any:
            return nnx.merge(graph, state).hidden(*rows)

        backward = jax.eval_shape(lambda s, hidden=hidden: jax.vjp(hidden, s)[1], model.state)
        kept[remat] = sum(x.size for x in jax.tree.leaves(backward))
    assert spec is not None
    widths = (2 * spec.heads + 2 * spec.kv_heads) * spec.head_dim + spec.embed
    experts = spec.kinds[0].experts
    mixture = experts + spec.experts_chosen * (2 * spec.expert_mlp + spec.embed)
    widths += mixture if experts else 2 * spec.mlp
    assert kept["none"] - kept["full"] == spec.layers * rows[0].size * widths
    attention = spec.heads * spec.head_dim
    assert kept["attention"] - kept["full"] == spec.layers * rows[0].size * attention


def test_biases_and_norms_only_where_the_family_has_them(tmp_path: Path) -> None:
    mesh = mesh_of(1, 1, 1)
    leaves = {
        name: {p for p, _ in flat_params(open_tiny(tmp_path, name, mesh).state)} for name in CONFIGS
    }
    always = {"q", "k", "v", "o", "gate", "up", "down", "embedding", "final_norm", "head"}
    own = {name: {p.split("/")[-1] for p in paths} - always for name, paths in leaves.items()}
    pre, post = {"attention_norm", "mlp_norm"}, {"attention_post_norm", "mlp_post_norm"}
    assert own == {
        "llama": pre,
        "qwen2": pre | {"q_bias", "k_bias", "v_bias"},
        "qwen3": pre | {"q_norm", "k_norm"},
        "mistral": pre,
        "gemma2": pre | post,
        "gemma3_text": pre | post | {"q_norm", "k_norm"},
        "phi3": pre,
        "olmo2": post | {"q_norm", "k_norm"},
        "mixtral": pre | {"router"},
        "qwen3_moe": pre | {"q_norm", "k_norm", "router"},
        "olmoe": pre | {"q_norm", "k_norm", "router"},
    }
    assert "head" in leaves["llama"]
    assert "head" not in leaves["qwen2"]


def test_random_weights_follow_seed_and_width(tmp_path: Path) -> None:
    mesh = mesh_of(1, 1, 1)
    one, same, other = (
        dict(flat_params(open_tiny(tmp_path, "llama", mesh, init_seed=seed).state))
        for seed in (1, 1, 2)
    )
    assert all((one[p] == same[p]).all() for p in one)
    assert not (one["embedding"] == other["embedding"]).any()
    assert not (one["layers/0/mlp/gate"] == one["layers/0/mlp/up"]).any()
    assert float(one["layers/0/attention/q"].std()) == pytest.approx(0.15, rel=0.05)
    assert (one["layers/0/mlp_norm"] == 1).all()


def test_bfloat16_compute_keeps_float32_weights_and_gradients(
    tmp_path: Path, rows: tuple[np.ndarray, ...], on_one_device: Any
) -> None:
    model = open_tiny(tmp_path, "qwen3", mesh_of(1, 1, 1), dtype="bfloat16")
    network = nnx.merge(model.graph, model.state)
    assert jax.eval_shape(network.hidden, *rows).dtype == jnp.bfloat16
    value, grads = loss_and_grads(model, rows)
    assert all(g.dtype == np.float32 for g in grads.values())
    assert float(value) == pytest.approx(float(on_one_device[0]), rel=2e-2)
    thin = open_tiny(tmp_path, "qwen3", mesh_of(1, 1, 1), param_dtype="bfloat16")
    assert all(p.dtype == jnp.bfloat16 for _, p in flat_params(thin.state))


def test_gradient_of_the_embedding_adds_up_in_float32(tmp_path: Path) -> None:
    """A token that occurs 4,104 times, which no bfloat16 can say."""
    model = open_tiny(tmp_path, "llama", mesh_of(1, 1, 1), dtype="bfloat16")
    tokens = jnp.zeros((8, 513), jnp.int32)

    def total(state: Any) -> jax.Array:
        return nnx.merge(model.graph, state).embed(tokens).astype(jnp.float32).sum()

    grads = dict(flat_params(jax.grad(total)(model.state)))
    assert (np.asarray(grads["embedding"][0]) == 4104).all()
    assert not np.asarray(grads["embedding"][1:]).any()
