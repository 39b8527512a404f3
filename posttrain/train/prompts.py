"""The prompts of a run, one after another without an end: each a function of seed and position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.chat.template import ChatError, ChatTemplate
from posttrain.config import ConfigError
from posttrain.data.order import PROMPTS, permutation
from posttrain.types import Prompt

_SHOWN = 5  # of the prompts that do not fit


class PromptStream:
    """Epochs over a task's prompts, each shuffled anew (or as they come)."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, *, shuffled: bool):
        if not len(prompts):
            raise ConfigError("task: it has no prompts to train on")
        self._prompts, self._seed, self._shuffled = prompts, seed, shuffled
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Prompts of an epoch."""
        return len(self._prompts)

    def take(self, position: int, count: int) -> list[Prompt]:
        """The prompts at position, position + 1, ... over all epochs."""
        return [self._prompts[self._index(p)] for p in range(position, position + count)]

    def first(self, count: int) -> list[Prompt]:
        """Prompts that the first `count` positions hold, each once."""
        return self.take(0, min(count, len(self)))

    def _index(self, position: int) -> int:
        epoch, within = divmod(position, len(self))
        if not self._shuffled:
            return within
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = permutation(len(self), PROMPTS, self._seed, epoch)
        return int(self._order[within])


def shortest_that_fit(
    prompts: Sequence[Prompt], chat: ChatTemplate, *, new_tokens: int, seq_len: int, split: str
) -> int:
    """Tokens of the shortest of the prompts, all of which fit with their answers.

    ValueError with what the template refuses; ConfigError with those that leave no room.
    """
    lengths, refused = [], []
    for prompt in prompts:
        try:
            ids = chat.generation_prompt(prompt.messages, prompt.tools, **prompt.template_kwargs)
            lengths.append(len(ids))
        except ChatError as error:
            refused.append(f"prompt {prompt.id}: {error.reason}")
            lengths.append(0)
    if refused:
        raise ValueError(_listed(refused, f"{split} prompts that the chat template refuses"))
    room = seq_len - new_tokens
    long = [
        f"prompt {prompt.id}: {length} tokens"
        for prompt, length in zip(prompts, lengths, strict=True)
        if length > room
    ]
    if long:
        raise ConfigError(
            _listed(
                long,
                f"of {len(prompts)} {split} prompts have more than the {room} tokens that "
                f"round.seq_len={seq_len} leaves beside sampling.max_new_tokens={new_tokens} "
                f"(the longest has {max(lengths)}: raise the one, lower the other)",
            )
        )
    return min(lengths)


def _listed(lines: list[str], what: str) -> str:
    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n    ".join([f"{len(lines)} {what}:", *lines[:_SHOWN], *more])
