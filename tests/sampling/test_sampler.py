"""What is kept and how it is drawn, against the definitions in plain numpy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.sampling.request import Sampling
from posttrain.sampling.sampler import (
    IN_ANSWER,
    IN_PROMPT,
    Choice,
    Drawn,
    Uses,
    changed,
    draw,
    kept,
    pick,
)

VOCAB, REAL = 24, 21  # rows, and tokens among them
PROMPT, ANSWER = (2, 5, 11), (5, 7)
DRAWS = 100_000


def choice_of(samplings: list[Sampling]) -> Choice:
    biased = np.full((len(samplings), 3), VOCAB, np.int32)
    bias = np.zeros(biased.shape, np.float32)
    for row, sampling in enumerate(samplings):
        for i, (token, value) in enumerate(sampling.logit_bias.items()):
            biased[row, i], bias[row, i] = token, value
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    floats = {n: np.array([getattr(s, n) for s in samplings], np.float32) for n in names}
    top_k = np.array([s.top_k for s in samplings], np.int32)
    return Choice(top_k=top_k, biased=biased, bias=bias, **floats)


ALL = Uses(*[np.bool_(True)] * 6)


def seen(rows: int) -> np.ndarray:
    marks = np.zeros((rows, VOCAB), np.uint8)
    marks[:, list(PROMPT)] |= IN_PROMPT
    marks[:, list(ANSWER)] |= IN_ANSWER
    return marks


def reference(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Probabilities by the definitions, float64 [REAL]."""
    x = logits[:REAL].astype(np.float64)
    for token in {*PROMPT, *ANSWER}:
        x[token] = (
            x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
        )
    x[list(ANSWER)] -= s.presence_penalty
    for token, bias in s.logit_bias.items():
        x[token] += bias
    if s.temperature == 0:
        return np.eye(REAL)[x.argmax()]
    order = np.argsort(-x)
    p = np.exp(x[order] / s.temperature - x.max() / s.temperature)
    if s.top_k:
        p[s.top_k :] = 0
    p /= p.sum()
    p[np.cumsum(p) - p >= s.top_p] = 0
    p[p < s.min_p * p[0]] = 0
    found = np.zeros(REAL)
    found[order] = p / p.sum()
    return found


OPTIONS = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0, repetition_penalty=1.2),
    "cold": Sampling(temperature=0.6),
    "hot": Sampling(temperature=3),
    "top_k": Sampling(top_k=4),
    "top_p": Sampling(top_p=0.7),
    "min_p": Sampling(min_p=0.15),
    "repetition": Sampling(repetition_penalty=1.7),
    "presence": Sampling(presence_penalty=1.5),
    "bias": Sampling(logit_bias={3: 4.0, 0: -20.0, 20: 1.0}),
    "all": Sampling(
        temperature=1.5,
        top_k=9,
        top_p=0.93,
        min_p=0.05,
        repetition_penalty=1.3,
        presence_penalty=-0.5,
        logit_bias={1: 2.0},
    ),
}


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    x = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32) * 2
    x[REAL:] = -np.inf
    return x


@functools.partial(jax.jit, static_argnames="count")
def draws(logits: jax.Array, marks: jax.Array, choice: Choice, uses: Uses, count: int) -> Drawn:
    """Of `count` rows that are all alike but for their keys."""
    rows = lambda x: jnp.broadcast_to(x, (count, *x.shape[1:]))  # noqa: E731
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(7)))(jnp.arange(count))
    return draw(rows(logits), rows(marks), keys, jax.tree.map(rows, choice), uses)


def needed(s: Sampling) -> Uses:
    penalties = s.repetition_penalty != 1 or s.presence_penalty != 0
    flags = (
        s.temperature > 0,
        s.top_k > 0,
        s.top_p < 1,
        s.min_p > 0,
        penalties,
        bool(s.logit_bias),
    )
    return Uses(*map(np.bool_, flags))


@pytest.mark.parametrize("name", OPTIONS)
def test_draws_follow_the_definition(logits: np.ndarray, name: str) -> None:
    """Chi-square of 100,000 draws, at a level of about one in a million."""
    sampling = OPTIONS[name]
    one = (logits[None], seen(1), choice_of([sampling]))
    found = draws(*one, needed(sampling), DRAWS)
    want = reference(logits, sampling)
    counts = np.bincount(np.asarray(found.token), minlength=REAL)
    assert len(counts) == REAL
    likely = want > 0
    assert counts[~likely].sum() == 0
    chi = ((counts - DRAWS * want)[likely] ** 2 / (DRAWS * want[likely])).sum()
    free = int(likely.sum()) - 1
    assert chi <= limit(free)
    token, logp, plain = (np.asarray(x) for x in (found.token, found.logp, found.plain_logp))
    np.testing.assert_allclose(logp, np.log(want[token]), atol=2e-6)
    shares = np.exp(logits[:REAL].astype(np.float64))
    np.testing.assert_allclose(plain, np.log(shares / shares.sum())[token], atol=2e-6)
    other = draws(*one, ALL, DRAWS)
    assert (np.asarray(other.token) == token).all(), "steps that no row needs change nothing"


def limit(free: int) -> float:
    """Of chi-square with so many degrees of freedom: Wilson and Hilferty 1931, at 4.75 sigma."""
    return free * (1 - 2 / (9 * free) + 4.75 * (2 / (9 * free)) ** 0.5) ** 3 if free else 0


def test_rows_are_drawn_each_in_its_own_way(logits: np.ndarray) -> None:
    """All options side by side: what one row asks for does not touch another."""
    samplings = list(OPTIONS.values())
    rows = np.tile(logits, (len(samplings), 1))
    choice = choice_of(samplings)

    @jax.jit
    def probabilities(x: Any) -> Any:
        x = changed(x, seen(len(rows)), choice, ALL)
        hot = np.where(choice.temperature == 0, 1, choice.temperature)
        return jax.nn.softmax(kept(x / hot[:, None], choice, ALL), -1)

    for sampling, found in zip(samplings, np.asarray(probabilities(rows)), strict=True):
        if sampling.temperature:
            np.testing.assert_allclose(found[:REAL], reference(logits, sampling), atol=1e-6)


@pytest.mark.parametrize("top_k", [0, 1, 3, 30, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_what_is_kept(top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=(6, 30)).astype(np.float32) * 2
    found = np.asarray(
        jax.jit(kept)(logits, choice_of([Sampling(top_k=top_k, top_p=top_p)] * 6), ALL)
    )
    for row, got in zip(logits, found, strict=True):
        order = np.argsort(-row)[: top_k or None]
        p = np.exp(row[order].astype(np.float64))
        before = np.cumsum(p / p.sum()) - p / p.sum()
        finite = set(np.flatnonzero(np.isfinite(got)).tolist())
        assert finite == set(order[before < top_p].tolist())
        assert all(got[i] == row[i] for i in finite)


def test_equal_logits_at_the_edge_are_all_kept() -> None:
    logits = np.array([[1.0, 3.0, 2.0, 2.0, -0.0, 0.0]], np.float32)
    for how in (Sampling(top_k=2), Sampling(top_p=0.6)):
        found = np.asarray(jax.jit(kept)(logits, choice_of([how]), ALL))[0]
        assert np.flatnonzero(np.isfinite(found)).tolist() == [1, 2, 3]


def test_a_token_without_probability_is_never_picked() -> None:
    """Wherever u falls, at the very ends too; in blocks that hold nothing at all."""
    rng = np.random.default_rng(3)
    p = rng.random((64, 700)).astype(np.float32) * (rng.random((64, 700)) < 0.02)
    p[:, 128:256] = 0
    p[:, 650] = 0.5
    ends = np.concatenate([np.zeros(8), np.full(8, 1 - 2**-24), rng.random(48)])
    found = np.asarray(jax.jit(pick)(p, ends.astype(np.float32)))
    assert (p[np.arange(64), found] > 0).all()
    ends_of = p.astype(np.float64).cumsum(-1)
    targets = ends * ends_of[:, -1]
    want = (ends_of > targets[:, None]).argmax(-1)
    clear = np.abs(ends_of - targets[:, None]).min(-1) > 1e-4
    assert clear.sum() > 30
    assert (found == want)[clear].all()
    assert (found[:8] == (p[:8] > 0).argmax(-1)).all()
    last = 699 - (p[8:16, ::-1] > 0).argmax(-1)
    assert (found[8:16] == last).all()
