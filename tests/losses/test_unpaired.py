"""Losses on labelled answers (kto, bco, apo_zero_unpaired): the formula in float64, its slope, what
is of all rows of a step, and what crosses a mesh."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from posttrain.losses import UNPAIRED_LOSSES
from posttrain.losses.kto import KTO
from posttrain.losses.unpaired import UnpairedLoss
from posttrain.sharding import batch_sharding
from posttrain.types import TWIN, Batch, Mean, Terms, TokenOutputs
from tests.losses.batches import B, S, T, make_labelled, mean
from tests.losses.formulas import answers_of, row_losses
from tests.models import hlo
from tests.models.tiny import mesh_of

WEIGHED = {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.6}
CASES = [(name, made()) for name, made in UNPAIRED_LOSSES.items()]
CASES += [(name, made.model_validate(WEIGHED)) for name, made in UNPAIRED_LOSSES.items()]


def terms_of(loss: UnpairedLoss, outputs: TokenOutputs, batch: Batch) -> Terms:
    """As the step makes them of one micro-batch."""
    if not loss.coupled:
        return loss(outputs, batch)
    return loss(outputs, batch, jax.lax.stop_gradient(loss.statistic(outputs, batch)))  # pyright: ignore


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1].beta}")
def test_value_and_metrics_are_the_formula(case: tuple[str, UnpairedLoss]) -> None:
    name, loss = case
    shifts = []
    for seed in range(4):
        batch, outputs = make_labelled(seed)
        want, shift = row_losses(name, loss, batch, outputs)
        shifts.append(shift)
        terms = terms_of(loss, outputs, batch)
        rows = np.asarray(batch.labels) >= 0
        assert terms.values.shape == terms.weights.shape == (B, S)
        np.testing.assert_array_equal(terms.weights, rows)
        np.testing.assert_allclose(np.asarray(terms.values)[rows], want, rtol=1e-5, atol=1e-6)
        assert (np.asarray(terms.source_ids)[~rows] == -1).all()
        reported = {"kto": ("kl", 1 / loss.beta), "bco": ("delta", 1.0)}.get(name)
        if reported:
            key, scale = reported
            assert terms.metrics[key].value == pytest.approx(shift * scale, rel=1e-5, abs=1e-7)
        said = answers_of(batch, outputs)
        labels = np.asarray(batch.labels)
        rewards = {at: loss.beta * (a.policy - a.reference).sum() for at, a in said.items()}
        for side, label in (("chosen", 1), ("rejected", 0)):
            of = [at for at in said if labels[at] == label]
            metrics = terms.metrics
            assert metrics[f"rewards/{side}"].value == pytest.approx(
                np.mean([rewards[at] for at in of]), rel=1e-5
            )
            assert metrics[f"logps/{side}"].value == pytest.approx(
                np.mean([said[at].policy.sum() for at in of]), rel=1e-5
            )
        right = [(rewards[at] > shift) == bool(labels[at]) for at in said if labels[at] >= 0]
        assert terms.metrics["rewards/accuracies"].value == pytest.approx(np.mean(right))
        tokens = sum(len(a) for at, a in said.items() if labels[at] >= 0)
        assert terms.metrics["entropy"].count == tokens
    if name == "kto":
        assert 0 in shifts, "no seed has a KL that is cut off at 0"
        assert max(shifts) > 0


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1].beta}")
def test_gradient_is_the_formulas_slope(case: tuple[str, UnpairedLoss]) -> None:
    """What is of all rows has none, and so have the twins."""
    name, loss = case
    batch, outputs = make_labelled(1)

    @jax.jit
    def ours(logps: jax.Array) -> jax.Array:
        return mean(terms_of(loss, dataclasses.replace(outputs, logps=logps), batch))

    found = np.asarray(jax.grad(ours)(outputs.logps))
    logps, step = np.asarray(outputs.logps, np.float64), 1e-5
    slopes = np.zeros((B, T))
    for b, t in np.argwhere(np.asarray(batch.loss_weights) > 0):
        nudge = np.zeros((B, T))
        nudge[b, t] = step
        up, down = (
            row_losses(name, loss, batch, outputs, logps + sign * nudge)[0].mean()
            for sign in (1, -1)
        )
        slopes[b, t] = (up - down) / (2 * step)
    np.testing.assert_allclose(found, slopes, rtol=1e-4, atol=1e-6 * np.abs(slopes).max())
    twin = np.take_along_axis(
        np.asarray(batch.labels) == TWIN, np.maximum(np.asarray(batch.segment_ids) - 1, 0), 1
    )
    assert not found[twin & (np.asarray(batch.segment_ids) > 0)].any()
    assert found.any()


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_parts_of_a_step_add_up_to_it(name: str) -> None:
    """Statistics and terms of two halves, added: those of the whole."""
    loss = UNPAIRED_LOSSES[name]()
    batch, outputs = make_labelled(1)
    halves = [
        jax.tree.map(lambda x, h=h: x[h], (outputs, batch)) for h in (slice(0, 3), slice(3, B))
    ]
    statistics = [loss.statistic(*half) for half in halves]  # pyright: ignore
    whole = {key: statistics[0][key] + statistics[1][key] for key in statistics[0]}
    parts = [loss(*half, whole) for half in halves]  # pyright: ignore
    want = terms_of(loss, outputs, batch)  # pyright: ignore
    total = sum((terms.values * terms.weights).sum() for terms in parts)
    np.testing.assert_allclose(total / want.weights.sum(), mean(want), rtol=1e-6)
    for key, value in want.metrics.items():
        added = parts[0].metrics[key] + parts[1].metrics[key]
        np.testing.assert_allclose(added.value, value.value, rtol=1e-6, err_msg=key)


def test_a_step_of_one_label_has_a_loss() -> None:
    batch, outputs = make_labelled()
    for label in (0, 1):
        labels = np.where(np.asarray(batch.labels) >= 0, label, np.asarray(batch.labels))
        one = dataclasses.replace(batch, labels=jnp.asarray(labels, jnp.int8))
        for name, made in UNPAIRED_LOSSES.items():
            terms = terms_of(made(), outputs, one)  # pyright: ignore
            want, _ = row_losses(name, made(), one, outputs)
            assert mean(terms) == pytest.approx(want.mean(), rel=1e-5)
            assert terms.metrics["rewards/chosen"].count == (terms.weights.sum() if label else 0)


def test_only_sums_cross_the_mesh() -> None:
    mesh = mesh_of(2, 4, 1)
    batch, outputs = make_labelled()
    rows = jax.NamedSharding(mesh, jax.P(*batch_sharding(mesh).spec[1:]))
    loss = KTO()

    def total(logps: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, Mean]]:
        terms = terms_of(loss, dataclasses.replace(outputs, logps=logps), batch)
        return (terms.values * terms.weights).sum(), terms.metrics

    def grads(logps: jax.Array, batch: Batch) -> tuple:
        (value, metrics), grad = jax.value_and_grad(total, has_aux=True)(logps, batch)
        return value, metrics, jax.lax.with_sharding_constraint(grad, rows)

    moved, logps = jax.device_put((batch, outputs.logps), rows)
    with jax.set_mesh(mesh):
        compiled = jax.jit(grads).lower(logps, moved).compile()
        value, _, grad = compiled(logps, moved)
    for collective in hlo.collectives(compiled.as_text() or ""):
        shapes = re.findall(r"\w+\[([\d,]*)\]", collective.line.split(f" {collective.op}")[0])
        sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
        assert max(sizes) <= B * S, collective.line
    alone = jax.jit(jax.value_and_grad(total, has_aux=True))(outputs.logps, batch)
    np.testing.assert_allclose(value, alone[0][0], rtol=1e-6)
    np.testing.assert_allclose(grad, alone[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("wrong", [{"beta": 0}, {"desirable_weight": 0}, {"nll_weight": 1}])
def test_settings_without_a_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        KTO.model_validate(wrong)
