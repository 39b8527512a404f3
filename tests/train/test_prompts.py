"""The order of prompts."""

from __future__ import annotations

import pytest

from posttrain.config import ConfigError
from posttrain.train.prompts import PromptStream
from posttrain.types import Prompt

PROMPTS = [Prompt(f"p/{i}", ({"role": "user", "content": "x" * (i + 1)},)) for i in range(10)]


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_an_epoch_has_each_prompt_once_in_an_order_of_its_own() -> None:
    stream = PromptStream(PROMPTS, 7, shuffled=True)
    epochs = [ids(stream.take(10 * epoch, 10)) for epoch in range(3)]
    assert all(sorted(epoch) == sorted(ids(PROMPTS)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert epochs[0] != ids(PROMPTS)


def test_where_prompts_go_on_they_are_what_they_would_have_been() -> None:
    """Across the border of an epoch, and whatever was looked at before."""
    whole = ids(PromptStream(PROMPTS, 7, shuffled=True).take(0, 30))
    stream = PromptStream(PROMPTS, 7, shuffled=True)
    for position, count in ((17, 8), (3, 20), (29, 1)):
        assert ids(stream.take(position, count)) == whole[position : position + count]
    assert ids(PromptStream(PROMPTS, 8, shuffled=True).take(0, 30)) != whole


def test_sequential_prompts_come_as_the_task_has_them() -> None:
    stream = PromptStream(PROMPTS, 7, shuffled=False)
    assert ids(stream.take(8, 4)) == ["p/8", "p/9", "p/0", "p/1"]
    assert len(stream.first(99)) == 10


def test_a_task_without_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match="no prompts"):
        PromptStream([], 0, shuffled=True)
