"""The prompts of a run, one after another without an end: each a function of seed and position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.config import ConfigError
from posttrain.data.order import PROMPTS, permutation
from posttrain.types import Prompt


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
