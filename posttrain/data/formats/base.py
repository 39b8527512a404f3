"""What a format is, and what formats share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.data.config import SourceConfig
from posttrain.data.normal import did_you_mean
from posttrain.data.rows import Problem, RowError, show, wrong_type
from posttrain.types import Labelled, Pair, Sample


@dataclass(frozen=True)
class Format:
    """`detect` never raises and may be handed anything; `convert` raises RowError.

    kind: what it makes: samples to imitate, Pairs or Labelled answers; None: the source's `fields`
    say.
    """

    detect: Callable[[Any], bool]
    convert: Callable[[Any, SourceConfig], Sample | Pair | Labelled]
    kind: Literal["samples", "pairs", "labelled"] | None = "samples"


@dataclass(frozen=True)
class Turns:
    """Raw messages, and where in its row each lies."""

    messages: Sequence[Any]
    places: Sequence[str]

    @classmethod
    def of(cls, messages: Sequence[Any], name: str) -> Turns:
        return cls(messages, [f"{name}[{i}]" for i in range(len(messages))])

    def split(self, at: int) -> tuple[Turns, Turns]:
        head = Turns(self.messages[:at], self.places[:at])
        return head, Turns(self.messages[at:], self.places[at:])


def as_object(row: Any, columns: tuple[str, ...]) -> Mapping[str, Any]:
    """The row as an object whose keys are not slips of the format's own columns.

    Other columns (ids, sources, labels) are nobody's business, `prompt_id` among them; `mesages` or
    `tool` is a slip that would lose data. Raises RowError.
    """
    if not isinstance(row, Mapping):
        raise RowError([wrong_type("row", row, f"an object with {columns[0]}")])
    slips = [
        Problem(str(key), "unknown column, very like a known one", f"did you mean {meant}?")
        for key in row
        if key not in columns
        and not str(key).lower().endswith("id")
        and (meant := did_you_mean(str(key), columns))
        and row.get(meant) is None
        and row[key] is not None
    ]
    if slips:
        raise RowError(slips)
    return row


def margin_of(row: Any, cfg: SourceConfig) -> float:
    """The margin of a row that makes a pair; 0 where it has none. RowError: it is no number."""
    value = row.get(cfg.margin) if cfg.margin and isinstance(row, Mapping) else None
    if value is None:
        return 0.0
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not math.isfinite(value):
        fix = "write a number, remove it, or set margin: '' in the source to leave it alone"
        raise RowError([Problem(cfg.margin, f"no number: {show(value)}", fix)])
    return float(value)


def items_have(row: Any, columns: tuple[str, ...], keys: tuple[str, ...]) -> str | None:
    """The first of `columns` that holds a list whose first object has all `keys`."""
    if not isinstance(row, Mapping):
        return None
    for column in columns:
        items = row.get(column)
        first = items[0] if isinstance(items, (list, tuple)) and items else None
        if isinstance(first, Mapping) and all(key in first for key in keys):
            return column
    return None
