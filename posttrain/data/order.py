"""Which examples an epoch sees, how often and in what order: a list of ids, decided before anything
is laid out in rows.

A pure function of (sources, seed, epoch): it knows of no host, mesh or batch. Random numbers come
from a counter-based generator keyed by (purpose, seed, epoch, ...), and only its raw bits are used:
NumPy promises those for good, but not what `Generator.permutation` makes of them.

Shapes: N examples of the cache, M of the epoch, S sources.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from posttrain.config import ConfigError

SHUFFLE, SUBSET, ROWS, STRATA, PROMPTS, ANSWERS = 1, 2, 3, 4, 5, 6
"""What a permutation is for: the first word of its key, so that no two purposes share numbers."""


def permutation(n: int, *key: int) -> Int[np.ndarray, " n"]:
    """A permutation of 0..n-1 that depends on n and the key alone (non-negative integers)."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


def mixture_repeats(
    names: Sequence[str],
    sizes: Sequence[int],
    weights: Sequence[float | None],
    repeats: Sequence[float],
) -> Float[np.ndarray, " S"]:
    """How often an epoch sees each example of each source.

    Without weights: `repeats` as they are. With weights: the sources' shares of an epoch's examples
    follow the weights, and the source with the most examples per weight is seen exactly once; so
    nothing is left out and the others repeat. Raises ConfigError where some sources have a weight
    and others have not or where a source has both; ValueError where it has no examples.
    """
    for name, size in zip(names, sizes, strict=True):
        if not size:
            raise ValueError(f"data.sources.{name}: no examples; remove it or see what was dropped")
    if all(w is None for w in weights):
        return np.asarray(repeats, np.float64)
    for name, weight, times in zip(names, weights, repeats, strict=True):
        if weight is None:
            raise ConfigError(
                f"data.sources.{name}.weight: not set, but other sources have one; "
                "give every source a weight, or none"
            )
        if times != 1:
            raise ConfigError(
                f"data.sources.{name}.repeats: {times:g} beside weight {weight:g}; the weights "
                "decide how often a source repeats: remove one of the two"
            )
    share = np.asarray(weights, np.float64) / np.asarray(sizes, np.float64)
    return share / share.min()


def epoch_order(
    source_ids: Int[np.ndarray, " N"],
    repeats: Float[np.ndarray, " S"],
    *,
    seed: int,
    epoch: int,
    order: str = "shuffle",
) -> Int[np.ndarray, " M"]:
    """Example ids in the order in which epoch `epoch` sees them.

    Of a source with repeats 2.3 every example comes twice, and 30% of them once more. That part is
    drawn without replacement across epochs: epoch 1 goes on in the source's own permutation where
    epoch 0 stopped, so that repeats 0.25 has seen every example after four epochs.

    `shuffle` mixes everything anew in each epoch. `sequential` keeps the cache's order: pass k over
    the cache takes the examples that are due more than k times.
    """
    due = repeats.astype(np.int64)[source_ids]
    for source, times in enumerate(repeats):
        ids = np.flatnonzero(source_ids == source)
        part = round((times - int(times)) * len(ids))
        turn = permutation(len(ids), SUBSET, seed, source)
        due[ids[turn[(epoch * part + np.arange(part)) % len(ids)]]] += 1
    passes = [np.flatnonzero(due > k) for k in range(due.max())]
    if not passes:
        raise ValueError(f"epoch {epoch} has no examples: repeats {list(repeats)} are too small")
    ids = np.concatenate(passes)
    return ids if order == "sequential" else ids[permutation(len(ids), SHUFFLE, seed, epoch)]


def even_steps(
    lengths: Int[np.ndarray, " M"], size: int, *, seed: int, epoch: int
) -> Int[np.ndarray, " M"]:
    """A permutation of a shuffled order, of which every `size` in a row have about equal lengths.

    A step of so many examples takes one of each stratum of lengths, drawn at random (stratified
    sampling). Rows are reserved for the step that needs the most: of 16 preference pairs as they
    come it needs up to twice the rows of the average step, and half of all positions stay empty.
    The last, short step keeps what it has.
    """
    steps = len(lengths) // size
    strata = np.argsort(lengths[: steps * size], kind="stable").reshape(size, steps)
    dealt = [s[permutation(steps, STRATA, seed, epoch, k)] for k, s in enumerate(strata)]
    return np.append(np.stack(dealt, axis=1), np.arange(steps * size, len(lengths)))
