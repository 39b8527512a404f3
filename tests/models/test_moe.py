"""Mixture of experts: a float64 definition, the papers' router losses, and the same on any mesh."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from posttrain.config import ConfigError
from posttrain.metrics import flatten
from posttrain.models import read_spec
from posttrain.models.hf import open_model
from posttrain.models.moe import (
    IN_AXES,
    OUT_AXES,
    ROUTER_AXES,
    RouterWeights,
    moe_mlp,
    router_loss,
)
from posttrain.models.spec import ModelConfig
from posttrain.sharding import partition_spec
from posttrain.types import Routing
from tests.models.hlo import collectives
from tests.models.tiny import mesh_of, write_config

B, T, D, E, F, CHOSEN = 8, 12, 16, 8, 24, 2
WEIGHTS = ("router", "gate", "up", "down")


@pytest.fixture(scope="module")
def case() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": (B, T, D), "router": (D, E), "gate": (E, D, F), "up": (E, D, F)}
    shapes |= {"down": (E, F, D), "back": (B, T, D)}
    arrays = {n: rng.normal(size=s).astype(np.float32) * 0.5 for n, s in shapes.items()}
    return arrays | {"real": np.arange(T) < rng.integers(T // 2, T + 1, (B, 1))}


def expected(case: dict[str, np.ndarray], normalised: bool) -> tuple[np.ndarray, dict[str, Any]]:
    """One token after another, in float64: (y, what the router did)."""
    w = {name: case[name].astype(np.float64) for name in ("x", *WEIGHTS)}
    y = np.zeros((B, T, D))
    did: dict[str, Any] = {"chosen": np.zeros(E), "probs": np.zeros(E)}
    did |= {"z": 0.0, "entropy": 0.0, "tokens": 0}
    for b, t in np.ndindex(B, T):
        x = w["x"][b, t]
        logits = x @ w["router"]
        p = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-p)[:CHOSEN]
        for e in best:
            gate = x @ w["gate"][e]
            out = (gate / (1 + np.exp(-gate)) * (x @ w["up"][e])) @ w["down"][e]
            y[b, t] += p[e] / (p[best].sum() if normalised else 1) * out
        if case["real"][b, t]:
            did["chosen"][best] += 1
            did["probs"] += p
            did["z"] += np.log(np.exp(logits).sum()) ** 2
            did["entropy"] -= (p * np.log(p)).sum()
            did["tokens"] += 1
    return y, did


def run(case: dict[str, Any], normalised: bool = True) -> tuple[jax.Array, Routing]:
    args = (case[name] for name in ("x", "real", *WEIGHTS))
    return moe_mlp(*args, chosen=CHOSEN, normalised=normalised)


@pytest.mark.parametrize("normalised", [True, False])
def test_equals_the_definition(case: dict[str, np.ndarray], normalised: bool) -> None:
    y, did = expected(case, normalised)
    found, routing = jax.jit(lambda c: run(c, normalised))(case)
    np.testing.assert_allclose(found, y, atol=2e-5)
    for name, want in did.items():
        np.testing.assert_allclose(getattr(routing, name), want, rtol=1e-5, err_msg=name)


def test_no_token_is_dropped_where_all_want_one_expert(case: dict[str, np.ndarray]) -> None:
    router = np.zeros((D, E), np.float32)
    router[0, 3], router[0, 5] = 30, 20
    case = case | {"router": router, "x": np.abs(case["x"]) + 0.5}
    found, routing = jax.jit(run)(case)
    np.testing.assert_allclose(found, expected(case, True)[0], atol=5e-5)
    assert routing.chosen[3] == routing.chosen[5] == routing.tokens


def all_experts(case: dict[str, Any]) -> jax.Array:
    """Every expert on every token, weighed by 0 where it was not chosen: no sorting, no groups."""
    p = jax.nn.softmax(case["x"] @ case["router"])
    rank = jnp.argsort(jnp.argsort(-p, axis=-1), axis=-1)
    weights = jnp.where(rank < CHOSEN, p, 0)
    weights /= weights.sum(-1, keepdims=True)
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", case["x"], case["gate"]))
    hidden *= jnp.einsum("btd,edf->btef", case["x"], case["up"])
    return jnp.einsum("btef,efd,bte->btd", hidden, case["down"], weights)


def objective(case: dict[str, Any], params: dict[str, Any], grouped: bool) -> jax.Array:
    case = case | params
    if not grouped:
        p = jax.nn.softmax(case["x"] @ case["router"])
        lse = jax.nn.logsumexp(case["x"] @ case["router"], axis=-1)
        real = case["real"]
        picked = jax.lax.stop_gradient(run(case)[1].chosen) / real.sum()
        balance = E * (picked * (p * real[..., None]).sum((0, 1)) / real.sum()).sum()
        z = (lse**2 * real).sum() / real.sum()
        return (all_experts(case) * case["back"]).sum() + 3 * balance + 2 * z
    y, routing = run(case)
    return (y * case["back"]).sum() + router_loss(routing, routing, RouterWeights(3, 2))


@pytest.fixture(scope="module")
def gradients(case: dict[str, np.ndarray]) -> dict[str, Any]:
    params = {name: case[name] for name in ("x", *WEIGHTS)}
    return jax.jit(jax.grad(lambda p: objective(case, p, grouped=False)))(params)


def grads_on(case: dict[str, np.ndarray], mesh: Any) -> tuple[Any, Any]:
    logical = {"x": ("batch", "length", None), "router": ROUTER_AXES}
    logical |= {"gate": IN_AXES, "up": IN_AXES, "down": OUT_AXES}
    layout = {n: NamedSharding(mesh, partition_spec(a, case[n].shape, mesh))
              for n, a in logical.items()}  # fmt: skip
    params = {name: jax.device_put(case[name], layout[name]) for name in layout}

    def both(params: Any) -> Any:
        return jax.grad(lambda p: objective(case, p, grouped=True))(params), run(case | params)

    with jax.set_mesh(mesh):
        return jax.jit(both, out_shardings=(layout, None))(params)


@pytest.mark.parametrize(
    "shape",  # data, fsdp, tensor, expert, context, fsdp_inner
    [
        (1, 1, 1, 1, 1),
        (1, 2, 2, 2, 1),
        (1, 1, 1, 8, 1),
        (1, 1, 1, 2, 4),
        (8, 1, 1, 1, 1),
        (1, 4, 1, 2, 1, 2),
    ],
)
def test_every_mesh_gives_the_same_with_gradients(
    case: dict[str, np.ndarray], gradients: dict[str, Any], shape: tuple[int, ...]
) -> None:
    found, (y, routing) = grads_on(case, mesh_of(*shape))
    want, did = expected(case, True)
    np.testing.assert_allclose(y, want, atol=2e-5)
    np.testing.assert_array_equal(routing.chosen, did["chosen"])
    for name, grad in gradients.items():
        np.testing.assert_allclose(found[name], grad, atol=1e-4, err_msg=name)


def test_what_the_mesh_does_not_divide_stays_whole(
    case: dict[str, np.ndarray], gradients: dict[str, Any]
) -> None:
    """24 of an expert's width over 16 devices of tensor there are not; here: 6 experts over 4."""
    few = case | {"router": case["router"][:, :6]} | {n: case[n][:6] for n in WEIGHTS[1:]}
    one, _ = grads_on(few, mesh_of(1, 1, 1))
    found, _ = grads_on(few, mesh_of(1, 2, 1, 4))
    for name, grad in one.items():
        np.testing.assert_allclose(found[name], grad, atol=1e-4, err_msg=name)
    three = {n: few[n][:3] for n in ("x", "real", "back")}  # rows that it does not divide
    with jax.set_mesh(mesh_of(1, 2, 1, 4)):
        y, _ = jax.jit(run)(few | three)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        np.testing.assert_allclose(y, jax.jit(run)(few | three)[0], atol=2e-5)


def test_tokens_travel_over_expert_and_weights_do_not(case: dict[str, np.ndarray]) -> None:
    mesh = mesh_of(1, 2, 1, 4)
    with jax.set_mesh(mesh):
        layout = NamedSharding(mesh, partition_spec(IN_AXES, (E, D, F), mesh))
        like = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in case.items()}
        like["gate"] = jax.ShapeDtypeStruct((E, D, F), jnp.float32, sharding=layout)
        like["up"] = like["gate"]
        text = jax.jit(run).lower(like).compile().as_text()
    gathered = [c.line for c in collectives(text) if c.op == "all-gather"]
    shapes = [re.search(r"= \(?\w+\[([\d,]*)\]", line) for line in gathered]
    sizes = [np.prod([int(n) for n in s.group(1).split(",")]) for s in shapes if s]
    assert max(sizes) <= E // 4 * D * F, gathered  # of its own experts, over fsdp
    assert B // 2 * T * D in sizes, "the tokens of a group"


def routing_of(rng: np.random.Generator, layers: int) -> tuple[Routing, np.ndarray]:
    """Sums over 40 tokens, and their logits [layers, 40, E]."""
    logits = rng.normal(size=(layers, 40, E))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-p, axis=-1)[..., :CHOSEN]
    chosen = (best[..., None] == np.arange(E)).sum((1, 2))
    lse = np.log(np.exp(logits).sum(-1))
    entropy = -(p * np.log(p)).sum((1, 2))
    sums = (chosen, p.sum(1), (lse**2).sum(1), entropy, np.full(layers, 40.0))
    return Routing(*(jnp.asarray(x, jnp.float32) for x in sums)), logits


BALANCE, Z = RouterWeights(1, 0), RouterWeights(0, 1)


def test_router_losses_are_the_papers() -> None:
    """Switch Transformer, eq. 4 to 6, and ST-MoE, eq. 5, layer by layer; also what is reported."""
    routing, logits = routing_of(np.random.default_rng(1), layers=3)
    balance, z = [], []
    for layer in logits:
        p = np.exp(layer) / np.exp(layer).sum(-1, keepdims=True)
        best = np.argsort(-p, axis=-1)[:, :CHOSEN]
        f = np.array([(best == e).any(1).mean() for e in range(E)])
        balance.append(E * (f * p.mean(0)).sum())
        z.append((np.log(np.exp(layer).sum(-1)) ** 2).mean())
    np.testing.assert_allclose(router_loss(routing, routing, BALANCE), np.mean(balance), rtol=1e-6)
    np.testing.assert_allclose(router_loss(routing, routing, Z), np.mean(z), rtol=1e-6)
    said = flatten({"routing": jax.device_get(routing)}, [])
    np.testing.assert_allclose(said["router/balance"], np.mean(balance), rtol=1e-6)
    np.testing.assert_allclose(said["router/z"], np.mean(z), rtol=1e-6)


def test_balance_is_the_number_chosen_where_all_is_even_and_more_where_not() -> None:
    even = Routing(jnp.full(E, 10.0), jnp.full(E, 5.0), *(jnp.float32(x) for x in (0, 0, 40)))
    np.testing.assert_allclose(router_loss(even, even, BALANCE), CHOSEN, rtol=1e-6)
    one = jnp.zeros(E).at[:2].set(40.0)
    worst = Routing(one, one / 2, even.z, even.entropy, even.tokens)
    np.testing.assert_allclose(router_loss(worst, worst, BALANCE), E, rtol=1e-6)


def test_the_losses_of_parts_add_up_with_the_shares_of_the_whole() -> None:
    rng = np.random.default_rng(2)
    parts = [routing_of(rng, 2)[0] for _ in range(3)]
    whole = jax.tree.map(lambda *x: sum(x), *parts)
    for weights in (BALANCE, Z):
        found = sum(router_loss(part, whole, weights) for part in parts)
        np.testing.assert_allclose(found, router_loss(whole, whole, weights), rtol=1e-6)


def test_parameters_are_counted(tmp_path: Path) -> None:
    """By hand: 64 wide, 4 heads of 24 and 2 of keys, 160 tokens; 8 experts in 1 of 2 layers."""
    spec = read_spec(write_config(tmp_path, "qwen3_moe", tie_word_embeddings=True))
    attention = 2 * 64 * 4 * 24 + 2 * 64 * 2 * 24 + 2 * 24 + 2 * 64
    mixture = 64 * 8 + 8 * 3 * 64 * 24
    assert spec.parameters == 2 * attention + 3 * 64 * 96 + mixture + 160 * 64 + 64


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1: only 0"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, of 4 experts"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0, expected a whole number"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0: it is not supported"),
    ],
)
def test_other_mixtures_are_refused_by_name(
    tmp_path: Path, name: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        read_spec(write_config(tmp_path, name, **fields))


def test_a_reward_model_that_could_not_be_saved_is_not_begun(tmp_path: Path) -> None:
    cfg = ModelConfig(path=str(write_config(tmp_path, "olmoe")), random_init=True)
    with pytest.raises(ConfigError, match="no sequence classifier of olmoe"):
        open_model(cfg, mesh_of(1, 1, 1), head="score", new_head=True)
