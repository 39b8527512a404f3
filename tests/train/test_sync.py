"""A reference that follows the policy: its recurrence in numpy, on one device and on eight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pydantic import ValidationError

from posttrain import sharding
from posttrain.data.plan import BatchConfig, Plan
from posttrain.jobs import preference
from posttrain.losses.dpo import DPO
from posttrain.train.config import ReferenceSync
from posttrain.train.offline import OfflineSource
from posttrain.train.state import TrainState, new_state
from posttrain.train.step import Forward, eval_step_fn, train_step_fn
from posttrain.train.sync import with_reference
from tests.models.tiny import mesh_of, open_tiny
from tests.train.test_step import SEQ_LEN, FakePairs

STEPS, SYNC = 5, ReferenceSync(every=2, mixup=0.3)


def train(folder: Path, sizes: tuple[int, int, int]) -> tuple[list[TrainState], list[dict], Any]:
    """The states before, between and after STEPS steps, what they reported, and the evaluation of
    the third step's batch by the parameters and the reference that it began with."""
    data, mesh, tx = FakePairs(), mesh_of(*sizes), optax.sgd(0.3)
    with jax.set_mesh(mesh):
        model = open_tiny(folder, "llama", mesh)
        batch = BatchConfig(examples=4, order="sequential")
        plan = Plan(data, batch, seq_len=SEQ_LEN, seed=0, steps=STEPS,
                    batch_shards=sharding.batch_shards(mesh))  # fmt: skip
        forward = Forward(model.graph, DPO(), mesh, plan.head_budget(), head_chunk=64, sources=2)
        state = with_reference(new_state(nnx.to_pure_dict(model.state), tx))
        step = train_step_fn(forward, tx, lambda _: jnp.float32(1), None, state, SYNC)
        states, said = [jax.device_get(state)], []
        source = OfflineSource(data, plan, mesh)
        evaluated = None
        for k in range(STEPS):
            given = source.next()
            if k == 2 and sizes == (1, 1, 1):
                evaluated = eval_step_fn(forward)(state.params, given, state.reference)
            state, metrics = step(state, given)
            states.append(jax.device_get(state))
            said.append(jax.device_get(metrics))
        source.close()
        return states, said, jax.device_get(evaluated)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[list[TrainState], list[dict], Any]:
    return train(folder, (1, 1, 1))


def test_the_reference_is_the_papers_recurrence(alone: Any) -> None:
    states, said, evaluated = alone
    policy = [[np.asarray(x, np.float64) for x in jax.tree.leaves(s.params)] for s in states]
    reference = policy[0]
    for k, state in enumerate(states):
        if k and k % 2 == 0:
            reference = [0.3 * p + 0.7 * r for p, r in zip(policy[k], reference, strict=True)]
        for found, want in zip(jax.tree.leaves(state.reference), reference, strict=True):
            np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-7)
    moved = np.abs(policy[-1][0] - reference[0]).max(), np.abs(policy[0][0] - reference[0]).max()
    assert min(moved) > 1e-4, "it is neither the policy nor what it started from"
    assert abs(said[0]["rewards/margins"].value) < 1e-6, "first it is the policy"
    for name in ("loss", "rewards/chosen", "rewards/rejected"):
        assert abs(said[2]["rewards/margins"].value) > 1e-5
        np.testing.assert_allclose(said[2][name].total, evaluated[name].total, rtol=1e-5, atol=1e-6)


def test_eight_devices_follow_as_one(folder: Path, alone: Any) -> None:
    states, said, _ = train(folder, (2, 2, 2))
    for found, want in zip(
        *(jax.tree.leaves(x[-1].reference) for x in (states, alone[0])), strict=True
    ):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    for mine, other in zip(said, alone[1], strict=True):
        np.testing.assert_allclose(mine["loss"].value, other["loss"].value, rtol=1e-5)


def config(**keys: Any) -> preference.Config:
    given = {
        "model": {"path": "m"},
        "data": {"sources": {"a": {"path": "a"}}},
        "batch": {"rows": 1},
    }
    sync = {"reference_sync": {"every": 4}}
    return preference.Config.model_validate({**given, **sync, **keys})


def test_what_cannot_follow_is_refused() -> None:
    assert config(reference="live").reference_sync == ReferenceSync(every=4, mixup=0.6)
    with pytest.raises(ValidationError, match=r"reference: cached.*set reference: live"):
        config()
    with pytest.raises(ValidationError, match="SimPO asks no reference"):
        config(reference="live", loss={"type": "simpo"})
    for wrong in ({"every": 0}, {"mixup": 0}, {"mixup": 1.1}):
        with pytest.raises(ValidationError):
            config(reference="live", reference_sync=wrong)
    with pytest.raises(ValidationError, match="adapters are trained: a mean of their factors"):
        config(reference="live", lora={"rank": 4})
    config(reference="live", lora={"rank": 4}, reference_sync={"mixup": 1})
