"""pass@k, majority vote and best of n, against the papers' definitions done the long way."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from posttrain.sampling.estimates import best_of, final_answer, majority, mean_and_error, pass_at


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n):
    for right in range(n + 1):
        answers = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            draws = list(combinations(answers, k))
            assert pass_at(k, n, right) == pytest.approx(
                np.mean([any(d) for d in draws]), abs=1e-12
            )


def test_pass_at_k_of_many_is_the_product_that_the_paper_computes():
    for n, right, k in [(200, 3, 100), (200, 1, 1), (1000, 17, 10), (100, 99, 2)]:
        product = 1.0 - np.prod(1.0 - k / np.arange(n - right + 1, n + 1, dtype=np.float64))
        assert pass_at(k, n, right) == pytest.approx(product, rel=1e-9)


def test_pass_at_k_is_unbiased():
    rng, p, n, k = np.random.default_rng(0), 0.3, 6, 3
    found = [pass_at(k, n, int(c)) for c in rng.binomial(n, p, 40_000)]
    assert np.mean(found) == pytest.approx(1 - (1 - p) ** k, abs=0.006)


def test_pass_at_more_than_there_are_is_refused():
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"pass@{k} of 4 answers"):
            pass_at(k, 4, 1)


def test_a_majority_vote_is_what_drawing_among_the_most_frequent_gives():
    rng = np.random.default_rng(1)
    for _ in range(200):
        votes = rng.integers(0, 4, rng.integers(1, 9)).tolist()
        right = [vote == 2 for vote in votes]
        counts = Counter(votes)
        winners = [v for v, c in counts.items() if c == max(counts.values())]
        assert majority(votes, right) == pytest.approx(np.mean([v == 2 for v in winners]))
    assert majority(["7", "7", "8"], [True, False, False]) == 0.5
    assert majority([], []) == 0.0


def test_best_of_n_is_the_answer_with_the_highest_reward():
    assert best_of([0.1, 0.9, 0.5], [True, False, True]) == 0.0
    assert best_of([0.1, 0.9, 0.9], [False, False, True]) == 0.5
    assert best_of([math.nan, 0.2], [False, True]) == 1.0
    assert best_of([math.nan], [True]) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"2 or \boxed{1,234.50}. Check: 9", "2469/2"),
        (r"\boxed{0.5}", "1/2"),
        (r"\boxed{x = 3}", "x = 3"),
        (r"So \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("<answer> (1 + 2) * 3 </answer>", "(1 + 2) * 3"),
        ("I say 3.\n#### 72", "72"),
        ("It is 7, then 12.", "12"),
        ("Paris,  of\ncourse", "Paris, of course"),
        ("$5 and -3.0", "-3"),
    ],
)
def test_votes_are_counted_by_the_final_answer(text, answer):
    assert final_answer(text) == answer


def test_the_error_of_a_mean():
    values = [0.0, 1.0, 0.5, 0.25]
    mean, error = mean_and_error(values)
    spread = math.sqrt(sum((v - 0.4375) ** 2 for v in values) / 3)
    assert (mean, error) == (0.4375, pytest.approx(spread / 2))
    assert math.isnan(mean_and_error([1.0])[1])
    assert math.isnan(mean_and_error([])[0])
