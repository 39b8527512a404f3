"""Strings that remember where each of their characters came from.

A `Traced` string carries runs, (length, Tag) pairs that add up to its length, through `+`, slices,
split, strip, replace, join, lower and the like. What an operation cannot follow becomes a plain
`str`, which counts as UNKNOWN: of no known source, and never trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

import markupsafe

NOBODY = -1  # owner of what belongs to no message
LITERAL, ROLE, FIELD, VALUE = "literal", "role", "field", "value"


class Tag:
    """Where characters came from.

    kind: LITERAL (text of the template, bos_token and eos_token among it), ROLE (a message's
    role), FIELD (text that somebody wrote), VALUE (worked out by the template: a number, a date).
    owner: index of the message it belongs to, NOBODY otherwise.
    text: the whole field, for a leaf; parts: the leaves inside, for JSON made of several.
    block: number of the `{% generation %}` block it was written in, 0 for none.
    """

    __slots__ = ("base", "block", "field", "kind", "owner", "parts", "text")

    def __init__(
        self,
        kind: str,
        owner: int = NOBODY,
        field: str = "",
        text: str = "",
        parts: tuple[Tag, ...] = (),
    ) -> None:
        self.kind, self.owner, self.field = kind, owner, field
        self.text, self.parts = text, parts
        self.block = 0
        self.base = self

    def inside(self, block: int) -> Tag:
        """The same source, written inside a generation block."""
        tag = Tag(self.kind, self.owner, self.field, self.text, self.parts)
        tag.block, tag.base = block, self.base
        return tag

    def __repr__(self) -> str:
        return f"Tag({self.kind}, owner={self.owner}, field={self.field!r})"


UNKNOWN = Tag(VALUE)
Runs = tuple[tuple[int, Tag], ...]


def runs_of(text: str) -> Runs:
    """The runs of a string; those of a plain one are UNKNOWN."""
    if isinstance(text, Traced):
        return text._runs
    return ((len(text), UNKNOWN),) if text else ()


def cut(runs: Runs, start: int, end: int) -> Runs:
    """The runs of text[start:end]."""
    out = []
    at = 0
    for length, tag in runs:
        low, high = max(start, at), min(end, at + length)
        if low < high:
            out.append((high - low, tag))
        at += length
        if at >= end:
            break
    return tuple(out)


def _plain(text: str) -> str:
    """The characters alone: str(x) of a subclass may be the subclass."""
    return str.__str__(text)


def _between(parts: list[str], gap: str) -> list[str]:
    """The parts with `gap` between each two."""
    out = [gap] * max(0, 2 * len(parts) - 1)
    out[::2] = parts
    return out


class Traced(str):
    """A str with runs. Build one with `traced(text, runs)`."""

    __slots__ = ("_runs",)
    _runs: Runs

    def _like(self, text: str, runs: Runs) -> Any:
        new = str.__new__(type(self), text)
        new._runs = runs
        return new

    def _cut(self, start: int, end: int) -> Any:
        if start == 0 and end == len(self):
            return self
        return self._like(str.__getitem__(self, slice(start, end)), cut(self._runs, start, end))

    def _admit(self, other: str) -> str:
        """The other side of a `+`, a join, a replace: Markup escapes it."""
        return other

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        if isinstance(other, TracedMarkup) and not isinstance(self, TracedMarkup):
            return NotImplemented
        other = self._admit(other)
        return self._like(str.__add__(self, other), self._runs + runs_of(other))

    def __radd__(self, other: str) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        other = self._admit(other)
        return self._like(str.__add__(_plain(other), self), runs_of(other) + self._runs)

    def __mul__(self, times: SupportsIndex) -> Any:
        return self._like(str.__mul__(self, times), self._runs * max(0, times.__index__()))

    __rmul__ = __mul__  # pyright: ignore[reportAssignmentType]

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        if isinstance(key, slice):
            start, end, step = key.indices(len(self))
            if step == 1:
                return self._cut(start, max(start, end))
            return self._join(self._cut(i, i + 1) for i in range(start, end, step))
        str.__getitem__(self, key)  # raises what a str raises: wrong type, out of range
        index = key.__index__() % len(self)
        return self._cut(index, index + 1)

    def __iter__(self) -> Iterator[Any]:
        return (self._cut(i, i + 1) for i in range(len(self)))

    def _join(self, parts: Iterable[str]) -> Any:
        parts = list(parts)
        runs = tuple(run for part in parts for run in runs_of(part))
        return self._like("".join(parts), runs)

    def strip(self, chars: str | None = None, /) -> Any:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Any:
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> Any:
        return self._cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> Any:
        return self._cut(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> Any:
        return self._cut(0, len(str.removesuffix(self, suffix)))

    def _pieces(self, parts: list[str], gap: int | None) -> list[Any]:
        """Each part with its runs; `gap` characters lie between two, None: look for the part."""
        out, at = [], 0
        for part in parts:
            if gap is None:
                at = self.index(part, at)
            out.append(self._cut(at, at + len(part)))
            at += len(part) + (gap or 0)
        return out

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._pieces(str.split(self, sep, maxsplit), None if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._pieces(str.rsplit(self, sep, maxsplit), None if sep is None else len(sep))

    def partition(self, sep: str, /) -> tuple[Any, Any, Any]:
        return tuple(self._pieces(list(str.partition(self, sep)), 0))  # pyright: ignore

    def rpartition(self, sep: str, /) -> tuple[Any, Any, Any]:
        return tuple(self._pieces(list(str.rpartition(self, sep)), 0))  # pyright: ignore

    def splitlines(self, keepends: bool = False) -> list[Any]:
        lines = self._pieces(str.splitlines(self, True), 0)
        if keepends:
            return lines
        return [line._cut(0, len(str.splitlines(line)[0])) for line in lines]

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Any:
        if not old or str.find(self, old) < 0:
            return self if old else str.replace(self, old, new, count)
        parts = self._pieces(str.split(self, old, count), len(old))
        return self._join(_between(parts, self._admit(new)))

    def join(self, parts: Iterable[str], /) -> Any:
        return self._join(_between([self._admit(part) for part in parts], self))

    def _same_length(self, text: str) -> Any:
        """Letter case changes keep each character's place, but for a few ('ß'.upper())."""
        return self._like(text, self._runs) if len(text) == len(self) else text

    def lower(self) -> Any:
        return self._same_length(str.lower(self))

    def upper(self) -> Any:
        return self._same_length(str.upper(self))

    def capitalize(self) -> Any:
        return self._same_length(str.capitalize(self))

    def title(self) -> Any:
        return self._same_length(str.title(self))

    def swapcase(self) -> Any:
        return self._same_length(str.swapcase(self))


class TracedMarkup(Traced):
    """What `|safe` gives: escapes what is put beside it, as markupsafe.Markup does."""

    __slots__ = ()

    def _admit(self, other: str) -> str:
        return other if hasattr(other, "__html__") else escape(other)

    def __html__(self) -> str:
        return self


def traced(text: str, runs: Runs) -> Traced:
    """A Traced string; the runs' lengths must add up to the text's."""
    new = str.__new__(Traced, text)
    new._runs = runs
    return new


def tagged(text: str, tag: Tag) -> Traced:
    """A Traced string of one source."""
    return traced(text, ((len(text), tag),) if text else ())


def mark_safe(text: str) -> TracedMarkup:
    """The `safe` filter."""
    new = str.__new__(TracedMarkup, text)
    new._runs = runs_of(text)
    return new


def escape(text: str) -> Traced:
    """HTML-escaped, each escape with the source of its character."""
    at, parts, runs = 0, [], []
    for length, tag in runs_of(text):
        part = _plain(markupsafe.escape(_plain(text)[at : at + length]))
        parts.append(part)
        runs.append((len(part), tag))
        at += length
    return traced("".join(parts), tuple(runs))


def concat(parts: Iterable[str]) -> Traced:
    """One Traced string of many pieces, neighbours of one source merged."""
    parts = list(parts)
    runs: list[tuple[int, Tag]] = []
    for part in parts:
        for length, tag in runs_of(part):
            if runs and runs[-1][1] is tag:
                runs[-1] = (runs[-1][0] + length, tag)
            else:
                runs.append((length, tag))
    return traced("".join(parts), tuple(runs))
