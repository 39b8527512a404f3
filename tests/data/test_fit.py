"""What is left of an example that is too long."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.data.fit import fit, fit_pair
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


def side(prompt, answer, bos=True):
    """A side of a pair: tokens of the prompt, then trained ones."""
    tokens = [BOS] * bos + [*prompt, *answer]
    weights = [0.0] * (bos + len(prompt)) + [1.0] * len(answer)
    return Example(np.array(tokens, np.int32), np.array(weights, np.float32))


def naive_fit_pair(prompts, answers, bos, room, how):
    """The sides as lists, worked out token by token; None where the pair is dropped."""
    sides = [[BOS] * bos + list(p) + list(a) for p, a in zip(prompts, answers, strict=True)]
    if all(len(s) <= room for s in sides):
        return sides
    if how == "drop":
        return None
    if how == "truncate_end":
        short = [s[:room] for s in sides]
        left = [len(s) - bos - len(p) for s, p in zip(short, prompts, strict=True)]
        return short if min(left) > 0 and short[0] != short[1] else None
    while any(len(s) > room for s in sides):
        begins = [s[bos : len(s) - len(a)] for s, a in zip(sides, answers, strict=True)]
        if any(len(b) < 2 for b in begins) or begins[0][:2] != begins[1][:2]:
            return None  # one more, and no token that both answer is left
        for s in sides:
            del s[bos]
    return sides


@pytest.mark.parametrize("how", ["truncate_start", "truncate_end", "drop"])
def test_pairs_are_cut_as_by_hand(how):
    """The prompt shrinks by as much on both sides (trl #2209), and an answer never to nothing."""
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(500):
        bos = bool(rng.integers(2))
        prompts = [rng.integers(100, 103, rng.integers(1, 12)).tolist()] * 2
        if not rng.integers(4):  # a template that renders the prompt by what follows it
            prompts = [prompts[0], [*prompts[0][:-1], 105, 106]]
        answers = [rng.integers(200, 202, rng.integers(1, 10)).tolist() for _ in "cr"]
        if answers[0] == answers[1]:
            continue
        both = [side(p, a, bos) for p, a in zip(prompts, answers, strict=True)]
        done = fit_pair(both[0], both[1], 10, how, BOS)
        wanted = naive_fit_pair(prompts, answers, bos, 10, how)
        assert (wanted is None) == bool(done.dropped)
        outcomes.add(done.dropped or ("cut" if done.cut_tokens else "whole"))
        if wanted is None:
            assert not done.examples
            continue
        assert [e.tokens.tolist() for e in done.examples] == wanted
        for short, whole, answer in zip(done.examples, both, answers, strict=True):
            kept = len(answer)
            if how == "truncate_end":
                kept -= max(0, len(whole.tokens) - 10)
            assert short.tokens[short.loss_weights > 0].tolist() == answer[:kept]
            assert len(short.tokens) <= 10
        assert done.cut_tokens == sum(len(e.tokens) for e in both) - sum(map(len, wanted))
        trained_before = sum(int((e.loss_weights > 0).sum()) for e in both)
        trained_after = sum(int((e.loss_weights > 0).sum()) for e in done.examples)
        assert done.cut_trained == trained_before - trained_after
    assert (
        outcomes
        == {
            "truncate_start": {
                "whole",
                "cut",
                "the answer alone is over seq_len",
                "over seq_len, and the sides' prompts part too soon",
            },
            "truncate_end": {
                "whole",
                "cut",
                "no trained token left on a side after truncate_end",
                "the sides are equal after truncate_end",
            },
            "drop": {"whole", "longer than seq_len"},
        }[how]
    )


def test_context_inside_an_answer_is_not_cut_as_prompt():
    """A tool's result, untrained and equal on both sides, is no part of the shared prompt."""
    weights = np.array([0, 0, 0, 1, 0, 0, 1, 1], np.float32)
    chosen = Example(np.array([BOS, 100, 101, 200, 102, 102, 201, 201], np.int32), weights)
    rejected = Example(np.array([BOS, 100, 101, 200, 102, 102, 202, 202], np.int32), weights)
    done = fit_pair(chosen, rejected, 7, "truncate_start", BOS)
    assert [e.tokens.tolist() for e in done.examples] == [
        [BOS, 101, 200, 102, 102, 201, 201],
        [BOS, 101, 200, 102, 102, 202, 202],
    ]
    dropped = "the answer alone is over seq_len"
    assert fit_pair(chosen, rejected, 6, "truncate_start", BOS).dropped == dropped


@pytest.mark.parametrize("how", ["split", "error"])
def test_pairs_have_no_other_way(how):
    with pytest.raises(ValueError, match="not a way to shorten a pair"):
        fit_pair(side([100], range(200, 220)), side([100], [201]), 10, how, BOS)
