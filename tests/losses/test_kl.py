"""The KL: whose gradient it has, in the loss and in the reward, summed over a whole vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.losses.kl import KL, Estimator
from posttrain.losses.policy_tokens import policy_tokens
from posttrain.types import Batch, TokenOutputs

ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")


def one_token(
    logits: np.ndarray, reference: np.ndarray, drawn_from: np.ndarray
) -> tuple[Any, Any, jax.Array]:
    """Every token x of a vocabulary, each an answer of a row of its own, and p_drawn(x): a mean
    over them by p_drawn is what draws converge to. Gives (log p of logits, a batch, p_drawn)."""
    v = len(logits)
    log_softmax = jax.nn.log_softmax
    segments = np.ones((v, 2), np.int32)

    def at(x):
        return jnp.stack([jnp.zeros(v), x], 1)

    ids = np.arange(v)[:, None]
    batch = Batch(
        segments, segments, segments, at(jnp.ones(v)), ids, 0 * ids,
        reference_logps=at(log_softmax(reference)), old_logps=at(log_softmax(drawn_from)),
        advantages=at(jnp.ones(v)),
    )  # fmt: skip
    return lambda z: at(log_softmax(z)), batch, jax.nn.softmax(drawn_from)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("off_policy", [False, True])
def test_pitfall_25_the_gradient_is_the_kls_own(estimator: Estimator, off_policy: bool) -> None:
    """Summed over the whole vocabulary, however far the policy is from the one that drew; and k3
    differentiated as it stands is not."""
    rng = np.random.default_rng(0)
    logits, reference, noise = rng.normal(size=(3, 7)).astype(np.float32)
    drawn_from = logits + 0.5 * off_policy * noise
    logps_of, batch, drawn = one_token(logits, reference, drawn_from)

    def exact(z: jax.Array) -> jax.Array:
        p = jax.nn.softmax(z)
        return (p * (jax.nn.log_softmax(z) - jax.nn.log_softmax(reference))).sum()

    def estimated(z: jax.Array, kl: KL) -> jax.Array:
        tokens = policy_tokens(TokenOutputs(logps_of(z)), batch)
        return (drawn * kl.per_token(tokens, batch.reference_logps)[:, 1]).sum()

    want = jax.grad(exact)(logits)
    kl = KL(coef=1, estimator=estimator)
    found = jax.grad(estimated)(logits, kl)
    np.testing.assert_allclose(found, want, atol=1e-6)
    if estimator != "k2":
        assert float(estimated(logits, kl)) == pytest.approx(float(exact(logits)), rel=1e-5)
    plain = jax.grad(estimated)(logits, KL(coef=1, estimator=estimator, unbiased=False))
    if not off_policy and estimator == "k2":
        np.testing.assert_allclose(plain, want, atol=1e-6)
    else:
        assert np.abs(plain - want).max() > 0.02
    if not off_policy and estimator == "k1":
        np.testing.assert_allclose(plain, 0, atol=1e-6)


def test_k1_in_the_reward_has_the_kls_gradient_too() -> None:
    """The policy gradient of penalties: k3's is another."""
    rng = np.random.default_rng(1)
    logits, reference = rng.normal(size=(2, 7)).astype(np.float32)
    logps_of, batch, drawn = one_token(logits, reference, logits)
    p = np.asarray(drawn, np.float64)
    d = np.asarray(logps_of(logits) - batch.reference_logps, np.float64)[:, 1]
    want = p * (d - (p * d).sum())  # of sum p d, whose rest sum p' is 0
    logps, of_reference = (np.asarray(x)[:, 1] for x in (logps_of(logits), batch.reference_logps))

    def gradient(estimator: Estimator) -> np.ndarray:
        kl = KL(coef=1, place="reward", estimator=estimator)
        cost = -kl.penalties(logps, of_reference, np.ones(7))
        return p * (cost - (p * cost).sum())

    np.testing.assert_allclose(gradient("k1"), want, atol=1e-6)
    assert np.abs(gradient("k3") - want).max() > 0.02


def test_penalties_are_of_sampled_tokens_and_only_in_the_reward() -> None:
    given = (np.array([-1.0, -2.0, -3.0]), np.array([-1.5, -1.0, 0.0]), np.array([1.0, 1.0, 0.0]))
    kl = KL(coef=0.1, place="reward", estimator="k1")
    np.testing.assert_allclose(kl.penalties(*given), [-0.05, 0.1, 0])
    kl = KL(coef=0.1, place="reward", estimator="k3")
    d = np.array([0.5, -1.0])
    np.testing.assert_allclose(kl.penalties(*given)[:2], -0.1 * (np.exp(-d) - 1 + d))
    assert not KL(coef=0.1).penalties(*given).any()


def test_what_is_said_of_the_kl() -> None:
    assert KL().line() == "kl: none"
    assert "own gradient" in KL(coef=0.1).line()
    assert "own gradient" in KL(coef=0.1, place="reward", estimator="k1").line()
    assert "biased" in KL(coef=0.1, unbiased=False).line()
    assert "biased" in KL(coef=0.1, place="reward").line()
    assert "holds nothing" in KL(coef=0.1, estimator="k1", unbiased=False).line()
