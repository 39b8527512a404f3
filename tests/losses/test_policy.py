"""Policy losses, the KL and the correction against float64 formulas of their papers: values and
gradients, whatever the layout of the answers; and what they report."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.losses import POLICY_LOSSES, VALUE_LOSSES
from posttrain.losses.cispo import CISPO
from posttrain.losses.clip import Clip
from posttrain.losses.correction import Correction
from posttrain.losses.kl import KL, Objective, objective
from posttrain.losses.policy_loss import PolicyLoss
from posttrain.losses.reinforce import Reinforce
from posttrain.losses.value import SquaredError
from posttrain.types import Batch, Extremes, Mean, Terms, TokenOutputs
from tests.losses.batches import make
from tests.losses.policy_formulas import (
    Answer,
    answers_of,
    loss_of,
    ratios,
    slope,
    weights_of,
)

NO_KL = KL()
CASES: list[tuple[PolicyLoss, KL]] = [
    (Clip(), NO_KL),
    (Clip(aggregate="sequence", low=0.1, high=0.3), KL(coef=0.3, unbiased=False)),
    (Clip(aggregate="constant", length=31, dual=1.6, high=0.28), KL(coef=0.3, estimator="k1")),
    (Clip(ratio="sequence", aggregate="sequence", low=0.01, high=0.02), KL(coef=0.2)),
    (Clip(ratio="product", aggregate="token", low=0.2, high=0.2), NO_KL),
    (Clip(correction=Correction(type="none"), entropy_coef=0.1), KL(coef=0.5, estimator="k2")),
    (CISPO(high=1.1), KL(coef=0.1, idle=True)),
    (CISPO(ratio="sequence", low=0.9, high=1.05, aggregate="sequence"), NO_KL),
    (Reinforce(aggregate="constant", length=1), KL(coef=0.1, place="reward", estimator="k1")),
    (Reinforce(correction=Correction(high=1.1, low=0.8)), NO_KL),
    (Reinforce(correction=Correction(type="mask", high=1.1, low=0.9)), NO_KL),
    (Clip(correction=Correction(type="mask", level="sequence", low=0.8)), NO_KL),
    (Clip(correction=Correction(level="sequence", high=1.1), aggregate="sequence"), NO_KL),
]


def rollouts(seed: int = 0) -> tuple[Batch, TokenOutputs]:
    """Answers anywhere in [B, S], whose every third has no advantage, said something of by an old
    policy and a sampler that are near, and a reference that is not."""
    batch, outputs = make(seed)
    rng = np.random.default_rng(seed)
    trained = np.asarray(batch.loss_weights)
    shape = trained.shape
    logps = np.asarray(outputs.logps)
    old = (logps + rng.normal(size=shape) * 0.3) * trained
    sampled = (old + rng.normal(size=shape) * 0.1) * trained
    each = rng.normal(size=np.asarray(batch.example_ids).shape)
    each *= np.asarray(batch.example_ids) % 3 > 0
    segments = np.maximum(np.asarray(batch.segment_ids) - 1, 0)
    advantages = np.take_along_axis(each, segments, 1) * rng.uniform(0.5, 1, shape) * trained
    arrays = {"old_logps": old, "sampled_logps": sampled, "advantages": advantages}
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    return dataclasses.replace(batch, **arrays), outputs


def mean(terms: Terms) -> jax.Array:
    return (terms.values * terms.weights).sum() / terms.count.sum()


def case_name(case: Any) -> str:
    kinds = [type(case[0]).__name__, *map(str, case[0].model_dump(exclude_defaults=True).values())]
    return " ".join([*kinds, *map(str, case[1].model_dump(exclude_defaults=True).values())])


@pytest.mark.parametrize("case", CASES, ids=map(case_name, CASES))
def test_value_and_gradient_are_the_formulas(case: tuple[PolicyLoss, KL]) -> None:
    loss, kl = case
    batch, outputs = rollouts()
    made = Objective(loss, kl)

    def value(logps: jax.Array) -> jax.Array:
        return mean(made(dataclasses.replace(outputs, logps=logps), batch))

    found, grad = jax.value_and_grad(value)(outputs.logps)
    answers, logps = answers_of(batch, outputs), np.asarray(outputs.logps, np.float64)
    want = loss_of(loss, kl, answers, logps)
    assert float(found) == pytest.approx(want, rel=3e-6)
    trained = np.asarray(batch.loss_weights) > 0
    of = slope(lambda x: loss_of(loss, kl, answers, x, at=logps), logps, trained)
    np.testing.assert_allclose(grad, of, rtol=1e-4, atol=3e-6 * np.abs(of).max())


def test_the_cases_clip_and_cut_off() -> None:
    """Else the formulas would not have been tried."""
    batch, outputs = rollouts()
    for loss, kl in CASES:
        metrics = Objective(loss, kl)(outputs, batch).metrics
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio"):
            if name in metrics:
                assert 0 < metrics[name].total < metrics[name].count, (name, loss)
        if loss.correction.type == "mask":
            assert metrics["sampling/importance_sampling_ratio"].low == 0


def test_pitfall_21_what_a_token_of_a_long_answer_counts() -> None:
    """An answer of one token and one of nine, each token's loss 1 and 2."""
    answers = [(1, 1.0), (9, 2.0)]
    totals = {"token": (1 + 18) / 10, "sequence": (1 + 2) / 2, "constant": (1 + 18) / (2 * 20)}
    segments, advantages = np.zeros((1, 12), np.int32), np.zeros((1, 12), np.float32)
    weights, start = np.zeros((1, 12), np.float32), 0
    for s, (n, a) in enumerate(answers):
        segments[0, start : start + n + 1] = s + 1
        weights[0, start + 1 : start + n + 1] = 1
        advantages[0, start + 1 : start + n + 1] = -a
        start += n + 1
    ids = np.array([[0, 1]])
    batch = Batch(segments, segments, segments, weights, ids, ids, advantages=advantages)
    batch = jax.tree.map(jnp.asarray, batch)
    zeros = jnp.zeros((1, 12), jnp.float32)
    for aggregate, want in totals.items():
        loss = Clip(aggregate=aggregate, length=20)  # pyright: ignore[reportArgumentType]
        assert float(mean(loss(TokenOutputs(zeros, zeros), batch))) == pytest.approx(want)


def test_pitfall_22_equal_groups_are_pulled_only_where_that_is_said() -> None:
    batch, outputs = rollouts()
    batch = dataclasses.replace(batch, advantages=jnp.zeros_like(batch.advantages))

    def grad(kl: KL) -> jax.Array:
        made = Objective(Clip(), kl)
        return jax.grad(
            lambda x: mean(made(dataclasses.replace(outputs, logps=x), batch))
        )(outputs.logps)  # fmt: skip

    assert not np.asarray(grad(KL(coef=0.5))).any()
    assert np.asarray(grad(KL(coef=0.5, idle=True))).any()


def test_pitfall_8_tokens_of_tools_are_in_nothing() -> None:
    """Not in the loss, the KL, a ratio of answers or a metric."""
    batch, outputs = rollouts()
    other = batch.loss_weights == 0
    noise = jnp.where(other, 3.0, 0.0)
    names = ("old_logps", "sampled_logps", "reference_logps", "advantages")
    noisy = dataclasses.replace(batch, **{n: getattr(batch, n) + noise for n in names})
    said = TokenOutputs(outputs.logps - noise, outputs.entropy + noise)
    correction = Correction(level="sequence")
    made = Objective(Clip(ratio="sequence", correction=correction, entropy_coef=0.1), KL(coef=0.1))
    want, found = made(outputs, batch), made(said, noisy)
    assert float(mean(found)) == float(mean(want))
    for x, y in zip(*(jax.tree.leaves(t.metrics) for t in (want, found)), strict=True):
        np.testing.assert_array_equal(x, y)


def value_of(metric: Mean) -> float:
    return float(metric.total / metric.count)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_metrics(level: Any) -> None:
    batch, outputs = rollouts()
    correction = Correction(level=level, high=1.2)
    loss = Clip(ratio=level, low=0.1, high=0.2, correction=correction, entropy_coef=0.2)
    metrics = Objective(loss, KL(coef=0.1, unbiased=False))(outputs, batch).metrics
    answers, logps = answers_of(batch, outputs), np.asarray(outputs.logps, np.float64)

    def all_of(per_token: Any) -> np.ndarray:
        """Of all tokens; of what is an answer's, of each answer's first."""
        found = [np.asarray(per_token(a)) for a in answers]
        return np.concatenate(found if level == "token" else [x[:1] for x in found])

    def everywhere(per_token: Any) -> np.ndarray:
        return np.concatenate([np.asarray(per_token(a)) for a in answers])

    def clipped(low: bool, high: bool) -> Any:
        def of(a: Answer) -> np.ndarray:
            r = ratios(loss, a, a.of(logps))
            below = low & (r < 0.9) & (a.advantages < 0)
            return (below | (high & (r > 1.2) & (a.advantages > 0))).astype(float)

        return all_of(of).mean()

    w = all_of(lambda a: weights_of(loss.correction, a))
    apart = everywhere(lambda a: np.abs(a.old - a.sampled))
    d = everywhere(lambda a: a.of(logps) - a.reference)
    policy_alone = loss.model_copy(update={"entropy_coef": 0})
    want = {
        "loss/policy_avg": loss_of(policy_alone, NO_KL, answers, logps),
        "entropy": everywhere(lambda a: a.entropy).mean(),
        "kl": (np.exp(-d) - 1 + d).mean(),
        "policy/approxkl_avg": everywhere(lambda a: 0.5 * (a.of(logps) - a.old) ** 2).mean(),
        "clip_ratio/low_mean": clipped(True, False),
        "clip_ratio/high_mean": clipped(False, True),
        "clip_ratio/region_mean": clipped(True, True),
        "policy/clipfrac_avg": clipped(True, True),
        "sampling/sampling_logp_difference/mean": apart.mean(),
        "sampling/importance_sampling_ratio/mean": w.mean(),
    }
    found = {name: value_of(x) for name, x in metrics.items() if isinstance(x, Mean)}
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    drew = Objective(loss, KL(coef=0.1, place="reward", estimator="k1"))(outputs, batch).metrics
    of_old = everywhere(lambda a: a.old - a.reference).mean()
    assert value_of(drew["kl"]) == pytest.approx(of_old, rel=1e-5)
    ends = {name: x for name, x in metrics.items() if isinstance(x, Extremes)}
    ratio, difference = "sampling/importance_sampling_ratio", "sampling/sampling_logp_difference"
    assert ends.keys() == {ratio, difference}
    for name, values in ((ratio, w), (difference, apart)):
        assert float(ends[name].low) == pytest.approx(values.min(), rel=1e-4, abs=1e-6)
        assert float(ends[name].high) == pytest.approx(values.max(), rel=1e-5)


def test_without_old_log_probs_the_policys_own_stand_for_them() -> None:
    """On the first update the ratio is 1, and its gradient the policy gradient's."""
    batch, outputs = rollouts()
    none = dataclasses.replace(batch, old_logps=None, sampled_logps=None)

    def grad(loss: PolicyLoss) -> jax.Array:
        return jax.grad(
            lambda x: mean(loss(dataclasses.replace(outputs, logps=x), none))
        )(outputs.logps)  # fmt: skip

    want = grad(Reinforce())
    assert np.asarray(want).any()
    for loss in (Clip(), CISPO()):
        np.testing.assert_allclose(grad(loss), want, rtol=1e-6)
    assert not any(name.startswith("sampling") for name in Clip()(outputs, none).metrics)


def test_nothing_overflows() -> None:
    """A token that the policy has left by 200 nats, and a sampler that was as far."""
    batch, outputs = rollouts()
    far = dataclasses.replace(
        batch, old_logps=batch.old_logps - 200, sampled_logps=batch.old_logps - 400
    )
    for loss in (Clip(), Clip(ratio="product"), CISPO(), Reinforce()):
        made = Objective(loss.model_copy(update={"correction": Correction(high=None)}), KL(coef=1))
        value, grad = jax.value_and_grad(
            lambda x, made=made: mean(made(dataclasses.replace(outputs, logps=x), far))
        )(outputs.logps)  # fmt: skip
        assert np.isfinite(value)
        assert np.isfinite(grad).all()


def test_needs_and_settings() -> None:
    assert "reference_logps" in objective(Clip(), KL(coef=0.1), 64).needs
    assert "reference_logps" not in objective(Clip(), KL(coef=0.1, place="reward"), 64).needs
    assert objective(Clip(aggregate="constant"), KL(), 64).loss.length == 64
    assert objective(Clip(aggregate="constant", length=7), KL(), 64).loss.length == 7
    batch, outputs = rollouts()
    with pytest.raises(ValueError, match=r"loss\.length must say"):
        Clip(aggregate="constant")(outputs, batch)
    with pytest.raises(ValueError, match="low must be below high"):
        Correction(low=3)
    with pytest.raises(ValueError, match="low must be below high"):
        CISPO(low=6)
    assert Clip(high=0.28, dual=3).dual == 3
    with pytest.raises(ValueError, match=r"dual is 1\.2 and 1 \+ high 1\.28"):
        Clip(high=0.28, dual=1.2)
    for made in (*POLICY_LOSSES.values(), *VALUE_LOSSES.values()):
        assert "Source:" in (made.__doc__ or "")


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_critics_loss(clip: float | None) -> None:
    batch, _ = rollouts()
    rng = np.random.default_rng(3)
    trained = np.asarray(batch.loss_weights) > 0
    values, old, returns = rng.normal(size=(3, *trained.shape)).astype(np.float32)
    given = dataclasses.replace(batch, returns=jnp.asarray(returns), old_values=jnp.asarray(old))
    terms = SquaredError(clip=clip)(TokenOutputs(values=jnp.asarray(values)), given)
    losses, cut = [], 0
    for v, o, r in zip(values[trained], old[trained], returns[trained], strict=True):
        square = (float(v) - r) ** 2
        near = float(o) + min(max(float(v) - o, -(clip or 9)), clip or 9)
        losses.append(max(square, (near - r) ** 2) / 2 if clip else square / 2)
        cut += clip is not None and (near - r) ** 2 > square
    total = (terms.values * terms.weights).sum() / terms.weights.sum()
    assert float(total) == pytest.approx(np.mean(losses), rel=1e-5)
    assert value_of(terms.metrics["val/clipfrac_avg"]) == pytest.approx(cut / len(losses))
    assert value_of(terms.metrics["loss/value_avg"]) == pytest.approx(float(total))
    error = ((values - returns)[trained] ** 2).mean()
    assert value_of(terms.metrics["values/error"]) == pytest.approx(error, rel=1e-5)
    assert value_of(terms.metrics["returns/mean"]) == pytest.approx(
        returns[trained].mean(), rel=1e-4
    )
