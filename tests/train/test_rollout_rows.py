"""Answers in rows: each once, in the shape that was promised, with its values beside its tokens."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.train.answers import Answers
from posttrain.train.rollout_rows import Shape, lay_out, make_batch, place, take_out

SHAPE = Shape(shards=2, rows=3, seq_len=32, segments=4)


def answers(count: int, seed: int = 0) -> Answers:
    """Prompts of 2 to 6 tokens and answers of 1 to 20; every value is its own."""
    rng = np.random.default_rng(seed)
    tokens, weights, numbers = [], [], []
    for _ in range(count):
        prompt, answer = int(rng.integers(2, 7)), int(rng.integers(1, 21))
        tokens.append(rng.integers(1, 99, prompt + answer).astype(np.int32))
        weights.append(np.repeat(np.array([0, 1], np.float32), [prompt, answer]))
        numbers.append(rng.normal(size=prompt + answer).astype(np.float32) * weights[-1])
    return Answers(tokens, weights, numbers, advantages=[x + 1 for x in numbers])


@pytest.mark.parametrize("count", [1, 5, 40])
def test_every_answer_lies_in_one_row_with_what_is_known_of_it(count: int) -> None:
    found = answers(count)
    room = SHAPE.micro_batches(40)
    layout = lay_out(found.lengths, found.trained, SHAPE, room)
    assert layout.ids.shape == (room, SHAPE.micro_rows, SHAPE.segments)
    assert sorted(layout.ids[layout.ids >= 0].tolist()) == list(range(count))
    assert (layout.ids[layout.live :] == -1).all()
    assert (layout.ids[: layout.live] >= 0).any((1, 2)).all()
    batch = make_batch(found, layout, SHAPE, range(SHAPE.micro_rows))
    for name, values in (("tokens", batch.tokens), ("advantages", batch.advantages)):
        out = take_out(values, layout.ids, found.lengths)
        for got, want in zip(out, getattr(found, name), strict=True):
            np.testing.assert_array_equal(got, want)
    assert batch.old_logps is None


def test_place_and_take_out_are_inverse_for_the_rows_of_one_process() -> None:
    found = answers(12)
    ids = lay_out(found.lengths, found.trained, SHAPE, 2).ids
    rows = place(found.sampled_logps, ids, SHAPE.seq_len)
    mine = place(found.sampled_logps, ids[:, 3:], SHAPE.seq_len)
    np.testing.assert_array_equal(rows[:, 3:], mine)
    assert all(map(np.array_equal, take_out(rows, ids, found.lengths), found.sampled_logps))


def test_a_row_has_no_more_answers_than_the_batch_has_room_for() -> None:
    """Twelve answers of 5 tokens: 6 would fit a row by their lengths."""
    lengths = np.full(12, 5)
    layout = lay_out(lengths, lengths - 1, SHAPE, 2)
    assert ((layout.ids >= 0).sum(-1) <= SHAPE.segments).all()
    assert (layout.ids >= 0).sum() == 12
