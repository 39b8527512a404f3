"""How far a long pass over data is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Part of a total (bytes read, or tokens), examples, tokens a second, time left; on stderr. Use
    as a context."""

    def __init__(self, title: str, total: int, *, shown: bool = True):
        self._title, self._total, self._shown = title, max(total, 1), shown
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._shown and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TextColumn("{task.fields[note]}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, note="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, examples: int, tokens: int) -> None:
        """So far. `done` may pass the total (a file that grew): it is capped."""
        now = time.monotonic()
        elapsed = max(now - self._began, 1e-9)
        part = min(done / self._total, 1.0)
        note = f"{examples:,} examples, {tokens / elapsed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=part * self._total, note=note)
        elif self._shown and now - self._said > LINE_EVERY:
            self._said = now
            left = f", {elapsed / part - elapsed:.0f} s left" if part else ""
            print(f"{self._title} {part:.0%} {note}{left}", file=sys.stderr, flush=True)
