"""Steps on the axes `expert` and `context`: the loss, the router's losses and all gradients are
those of one device, where nothing is cut and every sequence has a row of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posttrain.losses.nll import NLL
from posttrain.models.moe import RouterWeights, router_loss
from tests.models.tiny import mesh_of, open_tiny
from tests.train.test_step import SEQ_LEN, FakePairs, assert_same, step

ROUTER = RouterWeights(balance=0.5, z=0.05)
MIXTURE: dict[str, Any] = {
    "loss": NLL(), "data": FakePairs(sides=1), "family": "mixtral", "router": ROUTER
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def mixture_alone(folder: Path) -> tuple[dict[str, Any], Any]:
    return step(folder, (1, 1, 1), packing="none", **MIXTURE)


@pytest.mark.parametrize(
    ("mesh_sizes", "batch"),  # data, fsdp, tensor, expert, context, fsdp_inner
    [
        ((1, 4, 1, 2, 1, 2), {}),
        ((1, 1, 1, 2, 4), {"accumulate": 3}),  # windows of 5 reach into the shard before
    ],
)
def test_a_mixture_is_the_same_however_a_step_is_laid_out(
    folder: Path,
    mixture_alone: tuple[dict[str, Any], Any],
    mesh_sizes: tuple[int, ...],
    batch: dict[str, Any],
) -> None:
    found = step(folder, mesh_sizes, **MIXTURE, **batch)
    assert_same(found, mixture_alone)
    assert found[0]["routing"].tokens.tolist() == [MIXTURE["data"].lengths.sum()] * 2


def test_routers_are_trained_by_their_losses_beside_the_loss(
    folder: Path, mixture_alone: tuple[dict[str, Any], Any]
) -> None:
    """What they add to the gradient is their own, over all real tokens; the loss stays the loss."""
    data = MIXTURE["data"]
    plain = step(folder, (1, 1, 1), packing="none", **MIXTURE | {"router": RouterWeights(0, 0)})
    assert plain[0]["loss"].value == mixture_alone[0]["loss"].value
    mesh = mesh_of(1, 1, 1)
    rows = np.zeros((3, len(data.examples), SEQ_LEN), np.int32)  # tokens, positions, segments
    for i, example in enumerate(data.examples):
        n = len(example.tokens)
        rows[:, i, :n] = np.stack([example.tokens, np.arange(n), np.ones(n)])
    with jax.set_mesh(mesh):
        model = open_tiny(folder, "mixtral", mesh)

        def beside(state: Any) -> jax.Array:
            routing = nnx.merge(model.graph, state).routed(*jnp.asarray(rows))[1]
            return router_loss(routing, routing, ROUTER)

        grads = nnx.to_pure_dict(jax.jit(jax.grad(beside))(model.state))
    added = jax.tree.map(np.subtract, mixture_alone[1], plain[1])
    for found, want in zip(jax.tree.leaves(added), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(found, want, atol=2e-6)
    assert np.abs(grads["layers"]["0"]["moe"]["router"]).max() > 1e-3


def test_rows_cut_over_context_and_weights_over_two_axes_change_nothing(folder: Path) -> None:
    """Pairs in rows of 48 over 8 devices: segments, and what each token predicts, cross them.
    Weights that 4 devices hold, gathered and scattered 2 by 2, beside a tensor axis."""
    want = step(folder, (1, 1, 1), packing="none")
    assert_same(step(folder, (1, 1, 1, 1, 8)), want)
    assert_same(step(folder, (1, 4, 2, 1, 1, 2)), want)
