"""Every advantage as its paper has it, in float64 and one answer after another; and the figures of
public projects' own tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from posttrain.advantages import ADVANTAGES
from posttrain.advantages.base import (
    Signal,
    masked_mean,
    masked_var,
    std_of,
    whitened,
    without_signal,
)
from posttrain.advantages.gae import GAE
from posttrain.advantages.grpo import GRPO
from posttrain.advantages.reinforce import Reinforce
from posttrain.advantages.reinforce_pp import ReinforcePP
from posttrain.advantages.rloo import RLOO

REWARDS = np.array([1.0, 0.0, 0.5, 0.3, 2.0, 2.0, 2.0, -1.0, 0.1, 0.1])
GROUPS = np.array([7, 7, 7, 3, 3, 3, 7, 3, 9, 9])


def signal(**changes: Any) -> Signal:
    """Answers of 4 to 13 tokens, prompts and tools' tokens among them, with penalties, values."""
    rng = np.random.default_rng(0)
    n = rng.integers(4, 14, len(REWARDS))
    weights = [(np.arange(k) > 0) * (rng.random(k) < 0.7).astype(np.float32) for k in n]
    for w in weights:
        w[-1] = 1
    given = {
        "rewards": REWARDS,
        "groups": GROUPS,
        "weights": weights,
        "penalties": [rng.normal(size=len(w)) * 0.1 * w for w in weights],
        "values": [rng.normal(size=k) for k in n],
    }
    return Signal(**(given | changes))


def per_answer(found: Any, given: Signal) -> np.ndarray:
    """The one advantage of each answer's sampled tokens; there is none elsewhere."""
    out = []
    for a, w in zip(found.advantages, given.weights, strict=True):
        assert a.dtype == np.float32
        assert not a[w == 0].any()
        assert len(set(a[w > 0])) == 1
        out.append(a[w > 0][0])
    return np.array(out)


def rewards_with_penalties(given: Signal) -> list[float]:
    assert given.penalties is not None
    pairs = zip(given.rewards, given.penalties, given.weights, strict=True)
    return [r + sum(p[t] for t in range(len(p)) if w[t]) for r, p, w in pairs]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo(scale: Any) -> None:
    given = signal(penalties=None)
    found = GRPO(scale=scale)(given)
    want = []
    for r, g in zip(REWARDS, GROUPS, strict=True):
        group = [x for x, h in zip(REWARDS, GROUPS, strict=True) if h == g]
        apart = r - sum(group) / len(group)
        of = group if scale == "group" else list(REWARDS)
        mean = sum(of) / len(of)
        std = (sum((x - mean) ** 2 for x in of) / (len(of) - 1)) ** 0.5
        want.append(apart if scale == "none" else apart / (std + 1e-4))
    np.testing.assert_allclose(per_answer(found, given), want, rtol=1e-6, atol=1e-7)


def test_pitfall_22_equal_rewards_have_advantages_of_exactly_nothing() -> None:
    """Ten tenths, summed one after another, are not 1."""
    rewards = np.full(10, 0.1)
    assert sum(rewards.tolist()) != 1
    given = signal(rewards=rewards, groups=np.zeros(10, int), penalties=None)
    for advantage in (GRPO(), GRPO(scale="none"), RLOO()):
        assert not per_answer(advantage(given), given).any()


def test_rloo_is_of_the_others_and_of_rewards_with_their_penalties() -> None:
    given = signal()
    totals = rewards_with_penalties(given)
    want = []
    for i, g in enumerate(GROUPS):
        others = [totals[j] for j in range(len(totals)) if GROUPS[j] == g and j != i]
        want.append(totals[i] - sum(others) / len(others))
    np.testing.assert_allclose(per_answer(RLOO()(given), given), want, rtol=1e-6)
    whole = (np.array(want) - np.mean(want)) / (np.std(want, ddof=1) + 1e-4)
    np.testing.assert_allclose(per_answer(RLOO(normalise=True)(given), given), whole, rtol=1e-6)


def test_reinforce() -> None:
    given = signal()
    totals = np.array(rewards_with_penalties(given))
    for settings, want in [
        ({}, totals - totals.mean()),
        ({"baseline": "none"}, totals),
        ({"normalise": True}, (totals - totals.mean()) / (totals.std(ddof=1) + 1e-4)),
    ]:
        found = Reinforce.model_validate(settings)(given)
        np.testing.assert_allclose(per_answer(found, given), want, rtol=1e-6)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_pp(baseline: bool, gamma: float) -> None:
    given = signal()
    assert given.penalties is not None
    returns = []
    for i, (p, w) in enumerate(zip(given.penalties, given.weights, strict=True)):
        r = REWARDS[i] - baseline * np.mean([x for x, g in zip(REWARDS, GROUPS, strict=True)
                                             if g == GROUPS[i]])  # fmt: skip
        tokens = [p[t] for t in range(len(p)) if w[t]]
        tokens[-1] += r
        returns.append(
            [
                sum(gamma ** (s - t) * tokens[s] for s in range(t, len(tokens)))
                for t in range(len(tokens))
            ]
        )
    flat = np.concatenate(returns)
    found = ReinforcePP(gamma=gamma, baseline=baseline)(given).advantages
    for a, w, r in zip(found, given.weights, returns, strict=True):
        np.testing.assert_allclose(a[w > 0], (r - flat.mean()) / flat.std(ddof=1), rtol=1e-5)
        assert not a[w == 0].any()


def test_gae_has_torchtunes_figures() -> None:
    values = [np.array([0.0, 0, 0, 1])]
    given = Signal(np.array([1.0]), np.array([0]), [np.ones(4)], None, values)
    found = GAE(gamma=0.9, lam=0.95, whiten=False)(given)
    assert found.returns is not None
    np.testing.assert_allclose(found.returns[0], [0.6579225, 0.7695, 0.9, 1], rtol=1e-6)
    np.testing.assert_allclose(found.advantages[0], [0.6579225, 0.7695, 0.9, 0], rtol=1e-6)


@pytest.mark.parametrize("whiten", [False, True])
def test_gae_is_the_sum_of_the_papers_differences(whiten: bool) -> None:
    given, gamma, lam = signal(), 0.97, 0.9
    assert given.penalties is not None
    assert given.values is not None
    advantages, returns = [], []
    for i, (p, v, w) in enumerate(zip(given.penalties, given.values, given.weights, strict=True)):
        r, v = (list(x[w > 0]) for x in (p, v))
        r[-1] += REWARDS[i]
        v.append(0.0)
        n = len(r)
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        a = [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]
        advantages.append(a)
        returns.append([a[t] + v[t] for t in range(n)])
    if whiten:
        flat = np.concatenate(advantages)
        advantages = [(np.array(a) - flat.mean()) / flat.std(ddof=1) for a in advantages]
    found = GAE(gamma=gamma, lam=lam, whiten=whiten)(given)
    assert found.returns is not None
    for got, want in ((found.advantages, advantages), (found.returns, returns)):
        for x, y, w in zip(got, want, given.weights, strict=True):
            np.testing.assert_allclose(x[w > 0], y, rtol=1e-4, atol=1e-6)
            assert not x[w == 0].any()


def test_pitfall_26_values_at_tool_tokens_are_ignored() -> None:
    """verl's mask: two calls of a tool. What the critic says at 0s changes nothing, and what it
    says at 1s is as if they stood side by side."""
    mask = np.array([0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0], np.float32)
    rng = np.random.default_rng(1)
    values, noise = rng.normal(size=11), rng.normal(size=11)
    rewards, groups = np.array([0.7]), np.array([0])
    made = [
        GAE(gamma=0.9, lam=0.8, whiten=False)(Signal(rewards, groups, [w], None, [v]))
        for w, v in [
            (mask, values),
            (mask, np.where(mask > 0, values, noise)),
            (np.ones(5), values[mask > 0]),
        ]
    ]
    np.testing.assert_array_equal(made[0].advantages[0], made[1].advantages[0])
    np.testing.assert_allclose(made[0].advantages[0][mask > 0], made[2].advantages[0], rtol=1e-6)


def test_an_answer_that_nothing_scored_is_nobodys_measure() -> None:
    """TRL: the deviation of [1, 2, 3, nan] is 1."""
    assert std_of(np.array([1, 2, 3, np.nan])) == 1
    rewards = np.array([1, 2, 3, np.nan])
    weights = [np.ones(2, np.float32)] * 4
    given = Signal(rewards, np.zeros(4, int), weights, None, [np.full(2, 0.5)] * 4)
    np.testing.assert_allclose(per_answer(GRPO(scale="group")(given), given),
                               [-1 / 1.0001, 0, 1 / 1.0001, 0], rtol=1e-6)  # fmt: skip
    np.testing.assert_allclose(per_answer(RLOO()(given), given), [-1.5, 0, 1.5, 0])
    for made in ADVANTAGES.values():
        found = made()(given)
        assert not found.advantages[3].any()
        assert all(np.isfinite(a).all() for a in found.advantages)
    found = GAE()(given)
    assert found.returns is not None
    np.testing.assert_allclose(found.returns[3], 0.5)


def test_masked_mean_variance_and_whitening() -> None:
    """TRL's figures on [1, 2, 3, 4] with the mask [0, 1, 1, 0]."""
    values, mask = np.array([1.0, 2, 3, 4]), np.array([0, 1, 1, 0])
    assert masked_mean(values, mask) == 2.5
    assert masked_var(values, mask) == 0.5
    [found] = whitened([values], [mask])
    np.testing.assert_allclose(found, [0, -(0.5**0.5), 0.5**0.5, 0], rtol=1e-6)


def test_an_answer_that_is_not_trained_on_is_weighed_with_its_penalties_all_the_same() -> None:
    """Cut off and masked: the others' baseline is of rewards with penalties, or of none."""
    whole, given = signal(), signal()
    masked = Signal(
        given.rewards, given.groups, [np.zeros_like(given.weights[0]), *given.weights[1:]],
        given.penalties, given.values,
    )  # fmt: skip
    for made in (GRPO(), RLOO(), Reinforce()):
        want, found = made(whole).advantages, made(masked).advantages
        assert not found[0].any()
        for a, b in zip(found[1:], want[1:], strict=True):
            np.testing.assert_array_equal(a, b)


def test_groups_without_signal() -> None:
    rewards = np.array([1.0, 1, 0, 1, 5, np.nan, np.nan, np.nan])
    groups = np.array([0, 0, 1, 1, 2, 3, 3, 4])
    flat = without_signal(rewards, groups)
    assert flat.tolist() == [True, True, False, False, True, True, True, True]
    assert without_signal(np.zeros(0), np.zeros(0, int)).shape == (0,)


def test_a_critic_is_asked_for() -> None:
    assert [name for name, made in ADVANTAGES.items() if made.needs_values] == ["gae"]
    with pytest.raises(ValueError, match="needs a critic"):
        GAE()(signal(values=None))


def test_an_answer_without_a_sampled_token_is_passed_over() -> None:
    given = Signal(np.array([1.0, 0.0]), np.zeros(2, int), [np.zeros(3), np.ones(2)], None,
                   [np.zeros(3), np.zeros(2)])  # fmt: skip
    for made in ADVANTAGES.values():
        assert not made()(given).advantages[0].any()
