"""What encoding a text gives: ids, and the characters each stands for."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers


class LazyOffsets(Sequence[tuple[int, int]]):
    """The offsets of an encoding, asked for one at a time: a list of them all costs a tenth of
    the encoding itself. `changed` replaces those of some positions."""

    __slots__ = ("_found", "_length", "changed")

    def __init__(self, found: tokenizers.Encoding, length: int) -> None:
        self._found, self._length = found, length
        self.changed: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k: Any) -> Any:
        if k in self.changed:
            return self.changed[k]
        return self._found.token_to_chars(k)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for k, pair in enumerate(self._found.offsets):
            yield self.changed.get(k, pair)


@dataclass(frozen=True, slots=True)
class Encoding:
    """array: int32 [n], the ids; offsets: n pairs (start, end) in characters of the text. Tokens
    that share one character (its bytes) share its offsets; a token that stands for no character
    has start == end."""

    array: np.ndarray
    offsets: Sequence[tuple[int, int]]

    @property
    def ids(self) -> list[int]:
        """The ids as a list."""
        return self.array.tolist()


def token_range(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """The tokens [low, high) of text[start:end).

    A token that holds characters on both sides of `start` belongs to the range, since the text's
    first word may be in it; one on both sides of `end` does not: it is mostly somebody else's.
    """
    if start >= end:
        return 0, 0
    offsets = encoding.offsets
    low = bisect.bisect_left(offsets, (start,))
    while low > 0 and offsets[low - 1][1] > start:
        low -= 1
    high = bisect.bisect_left(offsets, (end,))
    while high > low and offsets[high - 1][1] > end:
        high -= 1
    return low, high
