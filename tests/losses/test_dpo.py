"""DPO against published figures and its formula in float64; what joining pairs costs on a mesh."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from posttrain.losses.aot import AOT
from posttrain.losses.dpo import DPO
from posttrain.losses.pairs import find_sides, segment_sums
from posttrain.sharding import batch_sharding
from posttrain.types import Batch, Mean, TokenOutputs
from tests.losses.batches import PAIRS, B, S, T, make, mean, of_sums
from tests.models import hlo
from tests.models.tiny import mesh_of

LOSSES = [DPO(), DPO(beta=0.5, label_smoothing=0.2), DPO(beta=0.03, nll_weight=0.7)]


def by_formula(loss: DPO, batch: Batch, logps: np.ndarray) -> dict[str, np.ndarray]:
    """Rafailov et al. 2023 eq. 7, Mitchell 2023 eq. 3 and Pang et al. 2024 eq. 1, pair by pair."""
    logps, reference = logps.astype(np.float64), np.asarray(batch.reference_logps, np.float64)
    names = ("loss", "chosen", "rejected", "logp", "logp_rejected", "nll", "source")
    found: dict[str, list] = {name: [] for name in names}
    for pair in range(PAIRS):
        inside = {}
        for b, s in np.argwhere(np.asarray(batch.pair_ids) == pair):
            side = bool(batch.chosen[b, s])
            inside[side] = (b, np.flatnonzero(np.asarray(batch.segment_ids[b]) == s + 1))
            found["source"] += [int(batch.source_ids[b, s])] if side else []
        policy = {side: logps[b, t].sum() for side, (b, t) in inside.items()}
        reward = {
            side: loss.beta * (policy[side] - reference[b, t].sum())
            for side, (b, t) in inside.items()
        }
        p = 1 / (1 + np.exp(-(reward[True] - reward[False])))
        value = -(1 - loss.label_smoothing) * np.log(p) - loss.label_smoothing * np.log(1 - p)
        b, t = inside[True]
        nll = -policy[True] / np.asarray(batch.loss_weights)[b, t].sum()
        found["nll"].append(nll)
        found["loss"].append(value + loss.nll_weight * nll)
        found["chosen"].append(reward[True])
        found["rejected"].append(reward[False])
        found["logp"].append(policy[True])
        found["logp_rejected"].append(policy[False])
    return {name: np.array(values) for name, values in found.items()}


def test_published_figures() -> None:
    """torchtune's test of DPO: three pairs, given as sums; here each side is one trained token."""
    policy = np.array([[-0.5, -0.1], [-10, -30], [-1, -21]], np.float32)
    reference = np.array([[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]], np.float32)
    batch, outputs = of_sums(policy, reference)
    terms = DPO()(outputs, batch)
    np.testing.assert_allclose(terms.values, [0.6931, 0.3133, 0.1269], atol=5e-5)
    assert terms.weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize("loss", LOSSES, ids=["plain", "smoothed", "rpo"])
def test_loss_and_metrics_are_the_formula(loss: DPO) -> None:
    for seed in range(5):
        batch, outputs = make(seed)
        want = by_formula(loss, batch, np.asarray(outputs.logps))
        terms = loss(outputs, batch)
        real = np.asarray(terms.weights) > 0
        assert terms.values.shape == (B * S // 2,)
        assert real.sum() == PAIRS
        np.testing.assert_allclose(np.asarray(terms.values)[real], want["loss"], rtol=2e-6)
        assert np.asarray(terms.source_ids)[real].tolist() == want["source"].tolist()
        assert (np.asarray(terms.source_ids)[~real] == -1).all()
        margins = want["chosen"] - want["rejected"]
        trained, chosen = np.asarray(batch.loss_weights) > 0, np.zeros((B, T), bool)
        for b, s in np.argwhere(np.asarray(batch.chosen)):
            chosen[b] |= np.asarray(batch.segment_ids[b]) == s + 1
        for name, value in {
            "rewards/chosen": want["chosen"].mean(),
            "rewards/rejected": want["rejected"].mean(),
            "rewards/margins": margins.mean(),
            "rewards/accuracies": (margins > 0).mean(),
            "logps/chosen": want["logp"].mean(),
            "logps/rejected": want["logp_rejected"].mean(),
            **({"nll_loss": want["nll"].mean()} if loss.nll_weight else {}),
            "entropy": np.asarray(outputs.entropy, np.float64)[trained].mean(),
            "mean_token_accuracy": np.asarray(outputs.correct)[trained & chosen].mean(),
        }.items():
            assert terms.metrics[name].value == pytest.approx(value, rel=2e-5), name


@pytest.mark.parametrize("loss", LOSSES, ids=["plain", "smoothed", "rpo"])
def test_gradient_is_the_formulas_slope(loss: DPO) -> None:
    batch, outputs = make()

    def ours(logps: jax.Array) -> jax.Array:
        return mean(loss(dataclasses.replace(outputs, logps=logps), batch))

    found = np.asarray(jax.grad(ours)(outputs.logps))
    logps, step = np.asarray(outputs.logps, np.float64), 1e-4
    for b, t in np.argwhere(np.asarray(batch.loss_weights) > 0):
        nudge = np.zeros((B, T))
        nudge[b, t] = step
        up, down = (by_formula(loss, batch, logps + sign * nudge)["loss"] for sign in (1, -1))
        assert found[b, t] == pytest.approx((up - down).mean() / (2 * step), rel=1e-4, abs=1e-7)
    assert not found[np.asarray(batch.loss_weights) == 0].any()


def test_rows_in_any_order_are_the_same_pairs() -> None:
    batch, outputs = make()
    want = DPO()(outputs, batch)
    for seed in range(3):
        rows = np.random.default_rng(seed).permutation(B)
        moved = jax.tree.map(lambda x, rows=rows: x[rows], (batch, outputs))
        found = DPO()(moved[1], moved[0])
        np.testing.assert_array_equal(found.values[:PAIRS], want.values[:PAIRS])


def test_long_answers_keep_their_digits() -> None:
    """Thousands of nats on each side, a difference of one: float32 sums of each would lose it."""
    n, rng = 2000, np.random.default_rng(0)
    reference = -rng.uniform(1, 9, (2, n + 1))
    logps = reference + rng.normal(0, 1e-3, (2, n + 1))

    def as_jax(x):
        return jnp.asarray(np.where(np.arange(n + 1) > 0, x, 0), jnp.float32)

    ids = jnp.array([[0], [1]])
    batch = Batch(
        tokens=jnp.zeros((2, n + 1), int),
        positions=jnp.tile(jnp.arange(n + 1), (2, 1)),
        segment_ids=jnp.ones((2, n + 1), int),
        loss_weights=as_jax(np.ones((2, n + 1))),
        example_ids=ids,
        source_ids=0 * ids,
        pair_ids=0 * ids,
        chosen=ids == 0,
        reference_logps=as_jax(reference),
    )
    logps, zeros = as_jax(logps), as_jax(np.zeros((2, n + 1)))
    exact = (np.asarray(logps, np.float64) - np.asarray(batch.reference_logps)).sum(1)
    terms = DPO(beta=1.0)(TokenOutputs(logps, zeros, zeros), batch)
    margin = terms.metrics["rewards/margins"].value
    assert margin == pytest.approx(exact[0] - exact[1], abs=1e-6)


def test_a_micro_batch_without_pairs_adds_nothing() -> None:
    batch, outputs = make()
    empty = {name: jnp.zeros_like(getattr(batch, name)) for name in ("segment_ids", "chosen")}
    none = {name: jnp.full_like(batch.pair_ids, -1) for name in ("pair_ids", "source_ids")}
    zero = jnp.zeros_like(batch.loss_weights)
    batch = dataclasses.replace(batch, **empty, **none, loss_weights=zero, reference_logps=zero)

    def total(logps: jax.Array) -> jax.Array:
        terms = DPO(nll_weight=1.0)(dataclasses.replace(outputs, logps=logps), batch)
        assert all(mean.total == mean.count == 0 for mean in terms.metrics.values())
        return (terms.values * terms.weights).sum()

    with jax.disable_jit():
        assert total(outputs.logps) == 0
    assert not find_sides(batch).real.any()
    assert not segment_sums(outputs.logps, batch).any()


@pytest.mark.parametrize(
    "loss", [DPO(nll_weight=0.1), DPO(ld_alpha=0.3, use_weighting=True), AOT()], ids=str
)
def test_joining_pairs_moves_segments_over_the_mesh_and_no_tokens(loss: Any) -> None:
    mesh = mesh_of(2, 4, 1)
    batch, outputs = make()
    layout = batch_sharding(mesh).spec
    rows = jax.NamedSharding(mesh, jax.P(*layout[1:]))

    def total(logps: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, Mean]]:
        terms = loss(dataclasses.replace(outputs, logps=logps), batch)
        return (terms.values * terms.weights).sum(), terms.metrics

    def grads(logps: jax.Array, batch: Batch) -> tuple:
        (value, metrics), grad = jax.value_and_grad(total, has_aux=True)(logps, batch)
        return value, metrics, jax.lax.with_sharding_constraint(grad, rows)

    moved, logps = jax.device_put((batch, outputs.logps), rows)
    with jax.set_mesh(mesh):
        compiled = jax.jit(grads).lower(logps, moved).compile()
        value, metrics, grad = compiled(logps, moved)
    found = hlo.collectives(compiled.as_text() or "")
    assert any(c.op == "all-gather" for c in found)
    for collective in found:
        shapes = re.findall(r"\w+\[([\d,]*)\]", collective.line.split(f" {collective.op}")[0])
        sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
        assert max(sizes) <= B * S, collective.line
    alone = jax.jit(jax.value_and_grad(total, has_aux=True))(outputs.logps, batch)
    np.testing.assert_allclose(value, alone[0][0], rtol=1e-6)
    np.testing.assert_allclose(grad, alone[1], rtol=1e-5, atol=1e-9)
    for name, want in alone[0][1].items():
        np.testing.assert_allclose(metrics[name].total, want.total, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"beta": 0}, {"label_smoothing": 0.5}, {"nll_weight": -1}])
def test_settings_without_a_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        DPO.model_validate(wrong)
