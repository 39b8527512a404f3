"""A step of rollouts: against the papers' formulas on log-probs made of plain logits, whatever the
rows, micro-batches and devices are. What losses are divided by (Terms.count) is part of it.

The gradient is read off the parameters: one update of plain gradient descent at rate 1 subtracts
it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from posttrain.losses.clip import Clip
from posttrain.losses.correction import Correction
from posttrain.losses.kl import KL, Objective
from posttrain.losses.value import SquaredError
from posttrain.models import hf
from posttrain.models.spec import ModelConfig
from posttrain.train.state import new_state
from posttrain.train.step import Forward, train_step_fn
from posttrain.types import Batch, TokenOutputs
from tests.losses.policy_formulas import answers_of, loss_of
from tests.models.tiny import mesh_of, write_config
from tests.train.test_step import assert_same

T, N, TEMPERATURE = 32, 14, 0.7
PER_TOKEN = ("old_logps", "sampled_logps", "reference_logps", "advantages", "returns", "old_values")
UNPACKED = {"mesh": (1, 1, 1), "micro_batches": 1, "rows": N, "segments": 1}
PACKED = {"mesh": (2, 4, 1), "micro_batches": 4, "rows": 8, "segments": 3}
OBJECTIVE = Objective(
    Clip(aggregate="constant", length=40, ratio="sequence", low=0.01, high=0.02, entropy_coef=0.1,
         correction=Correction(level="sequence", high=1.05)),
    KL(coef=0.2),
)  # fmt: skip


Rollouts = list[dict[str, Any]]


def rollouts() -> Rollouts:
    """Answers of very different lengths, a tool's tokens in some."""
    rng, made = np.random.default_rng(0), []
    for i in range(N):
        n = int(rng.integers(4, 28 if i % 2 else 11))
        weights = (np.arange(n) >= 2) & (rng.random(n) < 0.8)
        weights[-1] = True
        made.append({"tokens": rng.integers(0, 160, n), "loss_weights": weights.astype(float)})
    return made


def told(made: Rollouts, logps: np.ndarray) -> Rollouts:
    """With what an old policy, a sampler, a reference and a critic said, near the policy; and
    advantages, which one answer has none of. logps: row i is answer i's."""
    rng, filled = np.random.default_rng(1), []
    for i, rollout in enumerate(made):
        weights = rollout["loss_weights"]
        n = len(weights)
        near = {name: logps[i, :n] + 0.1 * rng.normal(size=n) for name in PER_TOKEN[:3]}
        of_critic = {name: rng.normal(size=n) for name in ("returns", "old_values")}
        advantage = np.full(n, (2 + rng.normal() if i % 4 else -0.5) * (i != 3))
        more = {**near, **of_critic, "advantages": advantage}
        filled.append({**rollout, **{name: x * weights for name, x in more.items()}})
    return filled


def batch_of(data: Rollouts, micro_batches: int, rows: int, segments: int) -> Batch:
    """The rollouts, one after another into the first row with room; sources take turns."""
    shape = (micro_batches, rows, T)
    arrays = {name: np.zeros(shape, np.float32) for name in ("loss_weights", *PER_TOKEN)}
    arrays |= {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids")}
    ids = np.full((micro_batches, rows, segments), -1, np.int32)
    used, count = np.zeros((2, micro_batches, rows), int)
    for i, rollout in enumerate(data):
        n = len(rollout["tokens"])
        room = (used + n <= T) & (count < segments)
        # shared out over the micro-batches, as far as they go
        a, b = min(np.argwhere(room).tolist(), key=lambda at: (count[at[0]].sum(), at))
        place = (a, b, slice(used[a, b], used[a, b] + n))
        for name, values in rollout.items():
            arrays[name][place] = values
        arrays["positions"][place] = np.arange(n)
        arrays["segment_ids"][place] = count[a, b] + 1
        ids[a, b, count[a, b]] = i
        used[a, b], count[a, b] = used[a, b] + n, count[a, b] + 1
    sources = np.where(ids >= 0, ids % 2, -1)
    return Batch(**arrays, example_ids=ids, source_ids=sources)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("model"), "llama")


def open_tiny(folder: Path, mesh: Any, head: Any = "lm") -> hf.Model:
    settings = {"dtype": "float32", "remat": "none", "vocab_multiple": 1, "random_init": True}
    return hf.open_model(ModelConfig(path=str(folder), **settings), mesh, head=head, new_head=True)


def step(
    folder: Path, data: Rollouts, loss: Any, layout: dict[str, Any], head: Any = "lm"
) -> tuple[Any, Any]:
    """(metrics, gradient as numpy) of one step over all rollouts."""
    layout = dict(layout)
    mesh = mesh_of(*layout.pop("mesh"))
    with jax.set_mesh(mesh):
        model = open_tiny(folder, mesh, head)
        params = nnx.to_pure_dict(model.state)
        forward = Forward(model.graph, loss, mesh, budget=N * T, head_chunk=64, sources=2,
                          temperature=TEMPERATURE)  # fmt: skip
        before = jax.device_get(params)
        state = new_state(params, optax.sgd(1.0))
        run = train_step_fn(forward, optax.sgd(1.0), lambda _: jnp.float32(1), None, state)
        state, metrics = run(state, batch_of(data, **layout))
        after = jax.device_get(state.params)
        return jax.device_get(metrics), jax.tree.map(np.subtract, before, after)


@dataclasses.dataclass
class Said:
    """The rollouts, and what softmax(logits / temperature) says of each, a row each, in float64."""

    data: Rollouts
    micro: Batch
    outputs: TokenOutputs


@pytest.fixture(scope="module")
def said(folder: Path) -> Said:
    mesh, made = mesh_of(1, 1, 1), rollouts()
    layout = {name: value for name, value in UNPACKED.items() if name != "mesh"}
    micro = jax.tree.map(lambda x: x[0], batch_of(made, **layout))
    with jax.set_mesh(mesh):
        model = open_tiny(folder, mesh)
        network = nnx.merge(model.graph, model.state)
        logits = jax.jit(lambda: network.logits(micro.tokens, micro.positions, micro.segment_ids))()
    z = np.asarray(logits, np.float64)[:, :-1] / TEMPERATURE
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    picked = np.take_along_axis(logp, micro.tokens[:, 1:, None], 2)[..., 0]
    entropy = -(np.exp(logp) * logp).sum(-1)
    logps, entropy = (
        np.pad(x, ((0, 0), (1, 0))) * (micro.loss_weights > 0) for x in (picked, entropy)
    )
    data = told(made, logps)
    micro = jax.tree.map(lambda x: x[0], batch_of(data, **layout))
    return Said(data, micro, TokenOutputs(logps, entropy))


def test_rows_micro_batches_and_devices_are_layout(folder: Path, said: Said) -> None:
    """The loss and that of each source are the formulas'; the count is answers times the length."""
    made, answers = OBJECTIVE, answers_of(said.micro, said.outputs)
    want = step(folder, said.data, made, UNPACKED)
    assert_same(step(folder, said.data, made, PACKED), want)
    metrics, logps = want[0], np.asarray(said.outputs.logps)
    whole = loss_of(made.loss, made.kl, answers, logps)
    assert metrics["loss"].value == pytest.approx(whole, rel=2e-5)
    assert metrics["loss"].count == N * 40
    by_source = metrics["loss_by_source"]
    for source in (0, 1):
        own = loss_of(made.loss, made.kl, answers, logps, source=source)
        share = by_source.total[source] / by_source.count[source]
        assert share == pytest.approx(own, rel=2e-5)
    assert 0 < metrics["clip_ratio/region_mean"].value < 1


def test_a_critics_step(folder: Path, said: Said) -> None:
    """Its values are read from the state before each token, by a head of its own."""
    metrics, grad = step(folder, said.data, SquaredError(), PACKED, head="value")
    micro, mesh = said.micro, mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        model = open_tiny(folder, mesh, "value")
        network = nnx.merge(model.graph, model.state)
        hidden = jax.jit(lambda: network.hidden(micro.tokens, micro.positions, micro.segment_ids))()
    weight = np.asarray(dict(hf.flat_params(model.state))["score"], np.float64)[:, 0]
    values = np.asarray(hidden, np.float64)[:, :-1] @ weight
    losses = []
    for b, t in np.argwhere(micro.loss_weights > 0).tolist():
        v, r, old = values[b, t - 1], micro.returns[b, t], micro.old_values[b, t]
        near = old + min(max(v - old, -0.2), 0.2)
        losses.append(max((v - r) ** 2, (near - r) ** 2) / 2)
    assert metrics["loss"].value == pytest.approx(np.mean(losses), rel=1e-5)
    assert np.asarray(grad["score"]).any()
    assert np.asarray(grad["embedding"]).any()
    assert 0 < metrics["val/clipfrac_avg"].value < 1


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_an_answer_that_is_masked_is_in_no_denominator(said: Said, aggregate: Any) -> None:
    """As one that was cut off and is not trained on: its weights are 0."""
    micro, outputs = said.micro, said.outputs
    loss = OBJECTIVE.loss.model_copy(update={"aggregate": aggregate})
    rows = np.arange(N)[:, None] != 5
    masked = dataclasses.replace(micro, loss_weights=micro.loss_weights * rows)
    terms = Objective(loss, OBJECTIVE.kl)(*jax.tree.map(jnp.asarray, (outputs, masked)))
    total = float((terms.values * terms.weights).sum() / terms.count.sum())
    others = [answer for answer in answers_of(micro, outputs) if answer.row != 5]
    want = loss_of(loss, OBJECTIVE.kl, others, np.asarray(outputs.logps))
    assert total == pytest.approx(want, rel=2e-5)
