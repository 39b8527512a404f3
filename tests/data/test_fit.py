"""What is left of an example that is too long."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.data.fit import fit
from posttrain.types import Example

BOS = 1


def example(n, trained_from, bos=True):
    tokens = np.arange(100, 100 + n, dtype=np.int32)
    if bos:
        tokens[0] = BOS
    weights = np.where(np.arange(n) >= max(trained_from, 1), 1, 0).astype(np.float32)
    return Example(tokens, weights)


@pytest.mark.parametrize("how", ["truncate_end", "truncate_start", "split", "drop"])
def test_what_fits_is_left_as_it_is(how):
    given = example(10, 3)
    assert fit(given, 10, how, BOS).examples == [given]


def test_truncate_end_keeps_the_start():
    done = fit(example(20, 5), 8, "truncate_end", BOS)
    (short,) = done.examples
    assert short.tokens.tolist() == [BOS, *range(101, 108)]
    assert short.loss_weights.tolist() == [0] * 5 + [1] * 3
    assert (done.cut_tokens, done.cut_trained) == (12, 12)


def test_truncate_start_keeps_the_end_and_a_bos():
    (short,) = fit(example(20, 5), 8, "truncate_start", BOS).examples
    assert short.tokens.tolist() == [BOS, *range(113, 120)]
    assert short.loss_weights.tolist() == [0, 0] + [1] * 6  # 113 has lost what it came from
    done = fit(example(20, 5, bos=False), 8, "truncate_start", BOS)
    assert done.examples[0].tokens.tolist() == list(range(112, 120))
    assert done.examples[0].loss_weights.tolist() == [0] + [1] * 7
    assert (done.cut_tokens, done.cut_trained) == (12, 8)


def test_what_would_train_nothing_is_dropped_with_the_reason():
    done = fit(example(20, 8), 8, "truncate_end", BOS)
    assert (done.examples, done.dropped) == ([], "no trained token left after truncate_end")
    weights = np.zeros(20, np.float32)
    weights[3] = 1
    done = fit(Example(example(20, 0).tokens, weights), 8, "truncate_start", None)
    assert done.dropped == "no trained token left after truncate_start"
    assert fit(example(20, 3), 8, "drop", BOS).dropped == "longer than seq_len"


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("n", [9, 15, 16, 17, 100, 1000])
def test_split_makes_every_token_a_target_once(n, bos):
    given = example(n, 1, bos)
    pieces = fit(given, 8, "split", BOS).examples
    targets = np.concatenate([p.tokens[p.loss_weights > 0] for p in pieces])
    assert targets.tolist() == given.tokens[1:].tolist()
    for piece in pieces:
        assert 2 <= len(piece.tokens) <= 8
        assert piece.loss_weights[0] == 0
        assert bool(piece.tokens[0] == BOS) == bos
        # each target stands behind the token it stood behind before
        for before, target, weight in zip(
            piece.tokens, piece.tokens[1:], piece.loss_weights[1:], strict=False
        ):
            assert not weight or target - before == 1 or before == BOS
    assert all(len(piece.tokens) == 8 for piece in pieces[:-1])


def test_pieces_that_train_nothing_are_counted():
    done = fit(example(40, 30), 8, "split", BOS)
    assert sum((e.loss_weights > 0).sum() for e in done.examples) == 10
    assert (len(done.examples), done.idle_pieces) == (3, 4)
    done = fit(example(40, 50), 8, "split", BOS)
    assert (done.examples, done.idle_pieces) == ([], 7)


def test_error_is_no_way_to_shorten():
    with pytest.raises(ValueError, match="not a way to shorten"):
        fit(example(20, 3), 8, "error", BOS)
