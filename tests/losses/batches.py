"""Made-up micro-batches and what a model and a reference said of them, for tests of losses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from posttrain.types import TWIN, Batch, Terms, TokenOutputs

B, T, S = 8, 24, 5
PAIRS = 9


def mean(terms: Terms) -> jax.Array:
    return (terms.values * terms.weights).sum() / terms.weights.sum()


def make(seed: int = 0) -> tuple[Batch, TokenOutputs]:
    """PAIRS pairs whose 2 * PAIRS sides lie anywhere in [B, S], with gaps between the numbers of
    segments in use, rows without any, and tokens that are context."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((B, T), np.int32)
    pair_ids, sources = (np.full((B, S), -1, np.int32) for _ in "ps")
    chosen = np.zeros((B, S), bool)
    places = [(b, s) for b in range(B - 1) for s in range(3)]  # row B - 1 stays empty
    rng.shuffle(places)
    for pair in range(PAIRS):
        for side in (True, False):
            b, s = places.pop()
            pair_ids[b, s], chosen[b, s], sources[b, s] = pair, side, pair % 3
    for b in range(B):
        start = 0
        for s in range(S):
            if pair_ids[b, s] >= 0:
                length = int(rng.integers(3, 9))
                segments[b, start : start + length] = s + 1
                start += length
    weights = (rng.random((B, T)) < 0.7) & (segments > 0)
    for b in range(B):
        for s in range(S):
            inside = np.flatnonzero(segments[b] == s + 1)
            weights[b, inside[:1]], weights[b, inside[1:2]] = False, True
    zeros = np.zeros((B, T), np.int32)

    def on(low, high):
        return np.where(weights, rng.uniform(low, high, (B, T)), 0).astype(np.float32)

    batch = Batch(
        tokens=zeros,
        positions=zeros,
        segment_ids=segments,
        loss_weights=weights.astype(np.float32),
        example_ids=np.where(pair_ids >= 0, 2 * pair_ids + ~chosen, -1),
        source_ids=sources,
        pair_ids=pair_ids,
        chosen=chosen,
        reference_logps=on(-4, 0),
    )
    outputs = TokenOutputs(on(-4, 0), on(0, 3), (on(0, 1) > 0.5).astype(np.float32))
    outputs = dataclasses.replace(outputs, log_sum_sq=on(-3, 0))
    return jax.tree.map(jnp.asarray, (batch, outputs))


def make_labelled(seed: int = 0) -> tuple[Batch, TokenOutputs]:
    """The same segments, half of them desirable or not, the other half their mismatched twins.

    Of an odd seed, policy and reference change places: a KL above 0 is below it there.
    """
    batch, outputs = make(seed)
    if seed % 2:
        logps = batch.reference_logps
        batch = dataclasses.replace(batch, reference_logps=outputs.logps)
        outputs = dataclasses.replace(outputs, logps=logps)
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((B, S)) < 0.6, 1, 0)
    labels = np.where(batch.chosen, labels, TWIN)
    labels = np.where(np.asarray(batch.pair_ids) >= 0, labels, -1)
    return dataclasses.replace(batch, labels=jnp.asarray(labels, jnp.int8)), outputs


def of_sums(
    policy: np.ndarray, reference: np.ndarray, lengths: np.ndarray | None = None
) -> tuple[Batch, TokenOutputs]:
    """A batch of whose pairs the sums [P, 2] are given, chosen first: a row is a pair, a side is
    context and then `lengths` tokens (1 by default) that share the sum."""
    pairs = len(policy)
    lengths = np.ones((pairs, 2), int) if lengths is None else lengths
    width = int(lengths.sum(1).max()) + 2
    segments, weights = np.zeros((pairs, width), np.int32), np.zeros((pairs, width), np.float32)
    said, by_reference = np.zeros((pairs, width)), np.zeros((pairs, width))
    for p in range(pairs):
        start = 0
        for side in (0, 1):
            n = int(lengths[p, side])
            segments[p, start : start + n + 1] = side + 1
            weights[p, start + 1 : start + n + 1] = 1
            said[p, start + 1 : start + n + 1] = policy[p, side] / n
            by_reference[p, start + 1 : start + n + 1] = reference[p, side] / n
            start += n + 1
    ids = np.arange(2 * pairs).reshape(pairs, 2)
    zeros = np.zeros_like(segments)
    batch = Batch(
        tokens=zeros,
        positions=zeros,
        segment_ids=segments,
        loss_weights=weights,
        example_ids=ids,
        source_ids=np.zeros_like(ids),
        pair_ids=ids // 2,
        chosen=ids % 2 == 0,
        reference_logps=by_reference.astype(np.float32),
    )
    outputs = TokenOutputs(said.astype(np.float32), weights, weights, weights)
    return jax.tree.map(jnp.asarray, (batch, outputs))
