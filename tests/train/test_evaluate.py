"""What is asked and what is expected, read from an example's own tokens and weights."""

from __future__ import annotations

import numpy as np

from posttrain.train.evaluate import expected_of, prompt_of
from posttrain.types import Example


def example(weights: list[float]) -> Example:
    return Example(np.arange(10, 10 + len(weights), dtype=np.int32), np.float32(weights))


def test_prompt_ends_where_training_begins() -> None:
    two_turns = example([0, 0, 1, 1, 0, 0, 1])
    assert prompt_of(two_turns) == [10, 11]
    assert expected_of(two_turns) == [12, 13]


def test_an_answer_at_the_end_is_expected_whole() -> None:
    last = example([0, 0, 0, 1, 0.5])
    assert prompt_of(last) == [10, 11, 12]
    assert expected_of(last) == [13, 14]
