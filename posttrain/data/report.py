"""What prepare did with every row: counted per source, shown as a table, kept as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from posttrain.types import DataKind

# upper ends of the histogram's bins, as parts of seq_len; the last bin is open
_BINS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1, 2, 4)


@dataclass
class SourceReport:
    """Every row of a source ends in exactly one of: bad_rows, or examples / dropped. Of pairs, all
    but tokens are counted in pairs; prompts_differ: their shared prompt has become other tokens on
    each side; pairs_in_row: both sides fit one row together. Of labelled answers: desirable;
    twins_cut, mismatched twins that lost the end of their answer; unpaired, rows that were pairs:
    each is two rows here."""

    rows: int = 0
    bad_rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    cut_trained: int = 0
    split: int = 0
    pieces: int = 0
    prompts_differ: int = 0
    pairs_in_row: int = 0
    desirable: int = 0
    twins_cut: int = 0
    unpaired: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def given(self) -> int:
        """Rows as the files have them."""
        return self.rows - self.unpaired

    def cut(self, tokens: int, trained: int) -> None:
        """One example, or pair, was shortened by so many tokens."""
        self.truncated += 1
        self.cut_tokens += tokens
        self.cut_trained += trained

    def add(self, other: SourceReport) -> None:
        for name, value in vars(other).items():
            if name == "dropped":
                self.dropped.update(value)
            else:
                setattr(self, name, getattr(self, name) + value)


@dataclass
class Report:
    """The whole preparation. `histogram[k]` counts lengths up to `edges[k]`, as rendered (before
    anything was cut; of pairs each side's); its last entry those over the last edge.
    tokens_per_second counts from the first byte read to the last example written."""

    fingerprint: str
    seq_len: int
    too_long: str
    sources: dict[str, SourceReport]
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    workers: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * (len(_BINS) + 1))
    kind: DataKind = "samples"

    @property
    def edges(self) -> list[int]:
        return [max(1, int(self.seq_len * part)) for part in _BINS]

    @property
    def total(self) -> SourceReport:
        total = SourceReport()
        for source in self.sources.values():
            total.add(source)
        return total

    @property
    def tokens_per_second(self) -> float:
        return self.total.tokens / self.seconds if self.seconds else 0.0

    def count_lengths(self, lengths: np.ndarray) -> None:
        places = np.searchsorted(self.edges, lengths, side="left")
        counts = np.bincount(places, minlength=len(self.histogram))
        self.histogram = [int(a + b) for a, b in zip(self.histogram, counts, strict=True)]

    def save(self, file: Path) -> None:
        sources = {
            name: {**vars(s), "dropped": dict(s.dropped)} for name, s in self.sources.items()
        }
        derived = {"edges": self.edges, "tokens_per_second": self.tokens_per_second}
        data = {**vars(self), "sources": sources, **derived}
        file.write_text(json.dumps(data, indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, file: Path) -> Report:
        data = json.loads(file.read_text())
        del data["edges"], data["tokens_per_second"]
        data["sources"] = {
            name: SourceReport(**{**source, "dropped": Counter(source["dropped"])})
            for name, source in data["sources"].items()
        }
        return cls(**data)

    def losses(self) -> list[str]:
        """One line for each way in which something of the data is not trained on as it lies."""
        lines = []
        things = "pairs" if self.kind == "pairs" else "examples"
        for name, source in self.sources.items():
            if source.bad_rows:
                lines.append(f"{name}: {source.bad_rows:,} bad rows skipped")
            if source.truncated:
                lines.append(
                    f"{name}: {source.truncated:,} {things} over {self.seq_len:,} tokens cut "
                    f"({self.too_long}): {source.cut_tokens:,} tokens lost, "
                    f"{source.cut_trained:,} of them trained"
                )
            if source.split:
                lines.append(
                    f"{name}: {source.split:,} examples over {self.seq_len:,} tokens split "
                    f"into {source.pieces:,} pieces"
                )
            if source.prompts_differ:
                lines.append(
                    f"{name}: {source.prompts_differ:,} pairs whose prompt the template renders "
                    "differently on the two sides (by what follows it)"
                )
            if source.unpaired:
                lines.append(
                    f"{name}: {source.unpaired:,} pairs read as two answers each, the chosen one "
                    "desirable and the rejected one not"
                )
            if source.twins_cut:
                lines.append(
                    f"{name}: {source.twins_cut:,} mismatched twins over {self.seq_len:,} tokens "
                    "cut (only their KL is measured)"
                )
            lines += [
                f"{name}: {count:,} dropped: {reason}" for reason, count in source.dropped.items()
            ]
        return lines

    def show(self, console: object | None = None) -> None:
        """Prints the report with rich."""
        from rich.console import Console
        from rich.table import Table

        if not isinstance(console, Console):
            console = Console()
            if not console.is_terminal:
                console = Console(width=160)  # a file or a pipe has no width
        entries = dict(self.sources)
        if len(entries) > 1:
            entries["total"] = self.total
        table = Table(
            title=f"prepared data {self.fingerprint[:12]}", title_justify="left", box=None
        )
        table.add_column("source")
        columns = {
            "rows": [s.rows for s in entries.values()],
            "pairs" if self.kind == "pairs" else "examples": [s.examples for s in entries.values()],
            "desirable": [s.desirable for s in entries.values()],
            "tokens": [s.tokens for s in entries.values()],
            "trained": [s.trained for s in entries.values()],
            "truncated": [s.truncated for s in entries.values()],
            "split": [s.split for s in entries.values()],
            "dropped": [s.dropped.total() for s in entries.values()],
            "bad": [s.bad_rows for s in entries.values()],
        }
        shown = {name: values for name, values in columns.items() if any(values)}
        for name in shown:
            table.add_column(name, justify="right", no_wrap=True)
        for name, *numbers in zip(entries, *shown.values(), strict=True):
            table.add_row(name, *(f"{n:,}" for n in numbers))
        console.print(table)
        total = self.total
        if total.tokens:
            console.print(
                f"trained {total.trained / total.tokens:.1%} of the tokens, "
                f"{total.tokens / max(total.examples, 1):,.0f} tokens "
                f"{'a pair' if self.kind == 'pairs' else 'an example'}; "
                f"{self.tokens_per_second:,.0f} tokens/s, {self.seconds:.1f} s, "
                f"{self.workers} worker processes",
                highlight=False,
            )
        if self.kind == "pairs" and total.examples:
            console.print(
                f"{total.pairs_in_row / total.examples:.1%} of the pairs fit a row of "
                f"{self.seq_len:,} with both sides",
                highlight=False,
            )
        most = max(self.histogram)
        lower = 0
        for edge, count in zip([*self.edges, None], self.histogram, strict=True):
            if count:
                label = f"{lower + 1:>7,} to {edge:,}" if edge else f"   over {lower:,}"
                bar = "█" * max(1, round(40 * count / most))
                late = lower >= self.seq_len
                console.print(
                    f"{label:<20} {count:>9,} {bar}",
                    style="yellow" if late else None,
                    highlight=False,
                )
            lower = edge or lower
        for line in self.losses():
            console.print(line, style="yellow", markup=False, highlight=False)
        for line in self.warnings:
            console.print(f"template: {line}", style="yellow", markup=False, highlight=False)
