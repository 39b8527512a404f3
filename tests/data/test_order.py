"""The order of examples: how often each is seen, that it is seeded, and the weights' arithmetic."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from posttrain.config import ConfigError
from posttrain.data.order import epoch_order, even_steps, mixture_repeats, permutation


def sources(*sizes: int) -> np.ndarray:
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


def test_permutation_is_one_and_its_bits_are_philox():
    # The reference writes the counter-based generator's contract out again: sort by raw words.
    words = np.random.Philox(np.random.SeedSequence((1, 7, 3))).random_raw(100)
    assert permutation(100, 1, 7, 3).tolist() == sorted(range(100), key=lambda i: words[i])
    assert sorted(permutation(1000, 5)) == list(range(1000))


def test_order_of_a_seed_is_pinned():
    """Another order under the same seed would break the resuming of every run under way."""
    assert permutation(10, 1, 0, 0).tolist() == PINNED


PINNED = [2, 0, 1, 4, 5, 6, 7, 8, 3, 9]


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_every_example_comes_as_often_as_its_source_repeats(order):
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids = rng.permutation(sources(*rng.integers(1, 50, 3)))
        repeats = rng.choice([0.0, 0.25, 0.5, 1.0, 1.7, 2.0, 3.3], 3)
        repeats[0] = 1.5
        seen = epoch_order(ids, repeats, seed=int(rng.integers(100)), epoch=2, order=order)
        times = np.bincount(seen, minlength=len(ids))
        for source, wanted in enumerate(repeats):
            mine = times[ids == source]
            assert set(mine) <= {int(wanted), int(wanted) + 1}
            assert abs(mine.sum() - wanted * len(mine)) <= 0.5 + 1e-9


def test_sequential_is_the_order_of_the_data():
    ids = sources(3, 2)
    whole = epoch_order(ids, np.array([1.0, 1.0]), seed=5, epoch=1, order="sequential")
    assert whole.tolist() == [0, 1, 2, 3, 4]
    twice = epoch_order(ids, np.array([1.0, 2.0]), seed=5, epoch=1, order="sequential")
    assert twice.tolist() == [0, 1, 2, 3, 4, 3, 4]


def test_shuffle_differs_by_seed_and_epoch_and_is_the_same_for_the_same():
    ids, ones = sources(500), np.ones(1)
    first = epoch_order(ids, ones, seed=0, epoch=0)
    assert first.tolist() == epoch_order(ids, ones, seed=0, epoch=0).tolist()
    others = [epoch_order(ids, ones, seed=s, epoch=e) for s, e in [(1, 0), (0, 1), (1, 1)]]
    for other in others:
        assert sorted(other) == sorted(first)
        assert np.mean(other == first) < 0.05
    assert np.mean(others[0] == others[1]) < 0.05  # seed 1, epoch 0 is not seed 0, epoch 1


def test_shuffle_is_uniform():
    """Each of the 24 orders of 4 examples comes up about as often: chi-square, 23 degrees."""
    ids, ones = sources(4), np.ones(1)
    n = 4800
    orders = [tuple(epoch_order(ids, ones, seed=3, epoch=e)) for e in range(n)]
    counts = np.array([orders.count(o) for o in set(orders)])
    assert len(counts) == 24
    assert ((counts - n / 24) ** 2 / (n / 24)).sum() < 49.7  # p = 0.001


def test_part_of_a_source_is_drawn_without_replacement_across_epochs():
    ids, quarter = sources(100), np.array([0.25])
    epochs = [epoch_order(ids, quarter, seed=9, epoch=e) for e in range(8)]
    assert sorted(np.concatenate(epochs[:4])) == list(range(100))
    assert sorted(np.concatenate(epochs[2:6])) == list(range(100))
    assert sorted(epochs[0]) != list(range(25))  # drawn, not the head of the source


def test_weights_give_the_shares_and_leave_nothing_out():
    repeats = mixture_repeats("abc", [1000, 100, 50], [0.6, 0.3, 0.1], [1.0, 1.0, 1.0])
    examples = repeats * [1000, 100, 50]
    np.testing.assert_allclose(examples / examples.sum(), [0.6, 0.3, 0.1])
    assert repeats.min() == 1 == repeats[0]  # the most examples per weight: 1667, 333, 500
    seen = epoch_order(sources(1000, 100, 50), repeats, seed=0, epoch=0)
    shares = np.bincount(sources(1000, 100, 50)[seen]) / len(seen)
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=1e-3)


def test_without_weights_the_repeats_are_as_given():
    assert mixture_repeats("ab", [10, 20], [None, None], [2.5, 0.1]).tolist() == [2.5, 0.1]


@pytest.mark.parametrize(
    ("sizes", "weights", "repeats", "message"),
    [
        ([10, 10], [1.0, None], [1.0, 1.0], r"sources\.b\.weight: not set"),
        ([10, 10], [1.0, 1.0], [1.0, 2.0], r"sources\.b\.repeats: 2 beside weight 1"),
        ([10, 0], [None, None], [1.0, 1.0], r"sources\.b: no examples"),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_name(sizes, weights, repeats, message):
    with pytest.raises(ValueError, match=message) as refused:
        mixture_repeats("ab", sizes, weights, repeats)
    # what the config alone decides is its error: exit code 2
    assert isinstance(refused.value, ConfigError) == ("no examples" not in message)


def test_an_epoch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="epoch 0 has no examples"):
        epoch_order(sources(3), np.array([0.1]), seed=0, epoch=0)


def test_even_steps_take_one_of_each_stratum_at_random():
    rng = np.random.default_rng(0)
    for n, size in [(1000, 16), (23, 4), (3, 5), (6, 1), (8, 8)]:
        lengths = rng.exponential(100, n).astype(np.int64)
        order = even_steps(lengths, size, seed=1, epoch=2)
        assert sorted(order) == list(range(n))
        assert order.tolist() == even_steps(lengths, size, seed=1, epoch=2).tolist()
        steps = n // size
        assert order[steps * size :].tolist() == list(range(steps * size, n))  # the short step
        dealt = lengths[order[: steps * size]].reshape(steps, size)
        ranked = np.sort(lengths[: steps * size]).reshape(size, steps)
        for stratum in range(size):
            assert sorted(dealt[:, stratum]) == ranked[stratum].tolist()
    lengths = rng.exponential(100, 1600).astype(np.int64)
    one, other = (even_steps(lengths, 16, seed=1, epoch=e).reshape(100, 16) for e in (0, 1))
    met, again = ({frozenset(p) for s in steps for p in pairwise(s)} for steps in (one, other))
    assert len(met & again) < 0.03 * 1500  # by chance 1 in 100 meets again
    longest = lengths[one].max(1)  # nowhere in particular: no step of the epoch is the hardest
    assert abs(np.corrcoef(longest, np.arange(100))[0, 1]) < 0.3
