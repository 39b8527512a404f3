"""The order of prompts, and prompts that leave no room for an answer."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.chat.template import ChatError
from posttrain.config import ConfigError
from posttrain.train.prompts import PromptStream, shortest_that_fit
from posttrain.types import Prompt

PROMPTS = [Prompt(f"p/{i}", ({"role": "user", "content": "x" * (i + 1)},)) for i in range(10)]


class Chat:
    """A token for each character."""

    def generation_prompt(self, messages: Any, tools: Any, **_: Any) -> list[int]:
        if messages[0]["content"] == "?":
            raise ChatError("no questions", "rendered")
        return [0] * len(messages[0]["content"])


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


def test_prompts_that_leave_no_room_are_all_told() -> None:
    chat: Any = Chat()
    fits = {"new_tokens": 4, "seq_len": 14, "split": "train"}
    assert shortest_that_fit(PROMPTS, chat, **fits) == 1
    with pytest.raises(
        ConfigError, match=r"7 of 10 train prompts have more than the 3 tokens"
    ) as e:
        shortest_that_fit(PROMPTS, chat, new_tokens=11, seq_len=14, split="train")
    assert "prompt p/3: 4 tokens" in str(e.value)
    assert "the longest has 10" in str(e.value)
    asked = [*PROMPTS, Prompt("odd", ({"role": "user", "content": "?"},))]
    with pytest.raises(ValueError, match=r"prompt odd: no questions$"):
        shortest_that_fit(asked, chat, **fits)
    with pytest.raises(ConfigError, match="no prompts"):
        PromptStream([], 0, shuffled=True)
