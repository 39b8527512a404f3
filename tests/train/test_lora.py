"""A step of adapters: what it moves, what it keeps, and that its layout changes nothing.

The gradient is read off the parameters: an update of plain gradient descent at rate 1 subtracts it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from posttrain import sharding
from posttrain.data.plan import BatchConfig, Plan
from posttrain.models.adapters import without_fresh
from posttrain.models.lora import is_adapter
from posttrain.models.nested import flat, join, split
from posttrain.optim import OptimConfig, decays, make_optimizer
from posttrain.train.config import TrainConfig
from posttrain.train.offline import OfflineSource
from posttrain.train.reference_store import fingerprint
from posttrain.train.state import new_state
from posttrain.train.step import Forward, train_step_fn
from posttrain.train.trainable import trained_rule
from tests.models.test_lora import with_adapters
from tests.models.tiny import mesh_of, open_tiny
from tests.train.test_step import (
    DPO_LOSS,
    PAIRS,
    SEQ_LEN,
    FakePairs,
    FakeReference,
    assert_same,
)


def step(
    folder: Path, mesh_sizes: tuple[int, int, int], *, live: bool = False, loss: Any = DPO_LOSS,
    dropout: float = 0.0, seed: int = 0, at: int = 0, **batch: Any,
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """One step over all the pairs: (metrics, gradient of the adapters as numpy)."""
    data, mesh = FakePairs(), mesh_of(*mesh_sizes)
    with jax.set_mesh(mesh):
        lora = {"rank": 4, "dropout": dropout}
        graph, params = with_adapters(folder, mesh, "llama", range(150, 152), **lora)
        rule = trained_rule(TrainConfig(), params, adapters=True)
        trained, frozen = split(params, rule)
        settings = {"examples": PAIRS, "order": "sequential"} | batch
        shards = sharding.batch_shards(mesh)
        plan = Plan(data, BatchConfig(**settings), seq_len=SEQ_LEN, seed=0, epochs=1,
                    batch_shards=shards)  # fmt: skip
        forward = Forward(graph, loss, mesh, plan.head_budget(), head_chunk=64, sources=2,
                          dropout=seed if dropout else None)  # fmt: skip
        source = OfflineSource(data, plan, mesh, reference=None if live else FakeReference(data))
        given = source.next()
        source.close()
        reference = None
        if live:  # the adapter as it was once, over the one base there is
            reference = join(jax.tree.map(lambda p: p * 0.5, trained), frozen)
        before = jax.device_get(trained)
        state = new_state(trained, optax.sgd(1.0))
        state = type(state)(state.step + at, state.params, state.opt_state)
        run = train_step_fn(forward, optax.sgd(1.0), lambda _: jnp.float32(1), None, state)
        state, metrics = run(state, given, reference, frozen)
        after = jax.device_get(state.params)
        return jax.device_get(metrics), jax.tree.map(np.subtract, before, after)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def unpacked(folder: Path) -> tuple[dict[str, Any], Any]:
    """One sequence a row, one device, one micro-batch: nothing to get wrong."""
    return step(folder, (1, 1, 1), packing="none")


@pytest.mark.parametrize(("sizes", "batch"), [((1, 1, 1), {}), ((2, 2, 2), {"accumulate": 4})])
def test_a_step_of_adapters_is_the_same_however_it_is_laid_out(
    folder: Path, unpacked: Any, sizes: tuple[int, int, int], batch: dict[str, Any]
) -> None:
    """Packed or not, on 1 device or 8, at once or by micro-batches."""
    moved = dict(flat(unpacked[1]))
    assert moved.keys() >= {"embedding_new", "head_new", "layers/0/mlp/up_lora_a"}
    assert all(is_adapter(path) for path in moved)
    assert all(np.abs(x).max() > 0 for x in moved.values())
    assert_same(step(folder, sizes, **batch), unpacked)


def test_dropout_is_a_function_of_seed_step_and_token(folder: Path, unpacked: Any) -> None:
    """Each token has its own wherever it lies: packed or not, by micro-batches, on 8 devices."""
    want = step(folder, (1, 1, 1), dropout=0.2, packing="none")
    assert_same(step(folder, (2, 2, 2), dropout=0.2, accumulate=4), want)
    later = step(folder, (1, 1, 1), dropout=0.2, packing="none", at=1)
    losses = [float(x[0]["loss"].value) for x in (want, unpacked, later)]
    assert len(set(losses)) == 3, losses


def test_a_live_reference_is_the_adapter_that_training_started_from(folder: Path) -> None:
    want, _ = step(folder, (1, 1, 1), live=True, packing="none")
    assert abs(want["rewards/margins"].value) > 0.01
    found, _ = step(folder, (1, 2, 1), live=True, accumulate=2)
    np.testing.assert_allclose(found["loss"].total, want["loss"].total, rtol=1e-5)


def test_fresh_adapters_are_no_other_reference(folder: Path) -> None:
    """Runs of any rank and seed, and of the whole model, find the same log-probs."""
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        base = nnx.to_pure_dict(open_tiny(folder, "llama", mesh).state)
        fresh = with_adapters(folder, mesh, "llama", rank=4, noise=False)[1]
        moved = with_adapters(folder, mesh, "llama", rank=4)[1]
        assert fingerprint(without_fresh(fresh)) == fingerprint(base)
        assert fingerprint(without_fresh(moved)) == fingerprint(moved) != fingerprint(base)


def test_only_what_is_trained_has_optimiser_state_and_decays_as_a_matrix(folder: Path) -> None:
    mesh = mesh_of(1, 4, 2)
    with jax.set_mesh(mesh):
        _, params = with_adapters(folder, mesh, "llama", rank=4)
        rule = trained_rule(TrainConfig(trainable=("final_norm",)), params, adapters=True)
        trained, frozen = split(params, rule)
        state = new_state(trained, make_optimizer(OptimConfig(weight_decay=0.1), 10))
    sizes = {x.shape for x in jax.tree.leaves(state.opt_state)} - {()}
    assert sizes == {x.shape for _, x in flat(trained)}
    assert "embedding" in frozen
    a = state.opt_state[0].mu["layers"]["0"]["attention"]["q_lora_a"]
    assert a.sharding.spec == jax.P(None, "fsdp", None)

    def path(text):
        return tuple(jax.tree_util.DictKey(x) for x in text.split("/"))

    cfg = OptimConfig()
    assert decays(path("layers/0/attention/q_lora_a"), cfg)
    assert decays(path("layers/0/attention/q_lora_b"), cfg)
    assert not decays(path("final_norm"), cfg)
