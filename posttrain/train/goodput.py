"""Where a run's time went, over all its starts: <run_dir>/goodput.json, and a table at the end.

Process 0's clock is cut without gaps into

  steps       dispatching and waiting for the devices: what is left when the others are taken off
  sampling    answers, their rewards and passes, of a run that learns online
  compile     the first call of the train step in each start
  data        waiting for a batch that came after the devices had finished the step before
  save        what a checkpoint holds the loop up for, and waiting for the last one
  evaluation  held-out data, their programs' compilation included
  setup       from a job's beginning to its loop, and going back to a checkpoint
  lost        steps made twice: after a crash those since the checkpoint, after a rollback likewise
  down        no process ran, or none said so: from what the last start wrote to the next beginning

so that they add up to the time since the first start began. Not counted: what comes after the last
step (the export), unless the run is started again, and the imports before a job begins; both are
`down` then. A start that is killed has written what it did up to `EVERY` seconds before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "goodput.json"
EVERY = 30.0  # seconds between two writes
KINDS = ["steps", "sampling", "compile", "data", "save", "evaluation", "setup", "lost", "down"]
GOOD = ("steps", "sampling")
_MARKS = 100  # checkpoints whose time is remembered


class Goodput:
    """The ledger of this start, on top of what earlier ones wrote.

    began: of this start, by time.monotonic. step: where it goes on: steps that were made after it
    are lost. primary: whether this process reads and writes the file.
    """

    def __init__(self, folder: Path, *, began: float, step: int, primary: bool):
        self._file = folder / FILE if primary else None
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._marks: dict[int, float] = {}
        self._starts, self._kind, self._since, self._wrote = 1, "setup", began, time.monotonic()
        if self._file is not None and self._file.exists():
            self._take_up(json.loads(self._file.read_text(encoding="utf-8")), began)
        self.lose(step)

    def _take_up(self, old: dict, began: float) -> None:
        self._seconds |= {kind: float(old["seconds"].get(kind, 0.0)) for kind in KINDS}
        self._marks = {int(step): seconds for step, seconds in old["marks"].items()}
        self._starts = old["starts"] + 1
        at = time.time() - (time.monotonic() - began)
        self._seconds["down"] += max(at - old["until"], 0.0)  # clocks of two hosts may differ

    def turn(self, kind: str) -> str:
        """From now on time is of that kind; what it was before."""
        now, before = time.monotonic(), self._kind
        self._seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Inside, time is of that kind."""
        before = self.turn(kind)
        try:
            yield
        finally:
            self.turn(before)

    def move(self, seconds: float, kind: str) -> None:
        """Of the time that was booked as steps, so much was of another kind."""
        self.turn(self._kind)
        self._seconds["steps"] -= seconds
        self._seconds[kind] += seconds

    def mark(self, step: int) -> None:
        """A checkpoint of this step is written: what was done before it is not lost any more."""
        self.turn(self._kind)
        self._marks[step] = self._seconds["steps"]
        self._marks = dict(sorted(self._marks.items())[-_MARKS:])
        self.write()

    def lose(self, step: int) -> None:
        """Steps after this one are made again."""
        self.turn(self._kind)
        kept = [at for at in self._marks if at <= step]
        useful = self._marks[max(kept)] if kept else 0.0
        if step and not kept:  # of a run that began without a ledger: nothing is known
            useful = self._seconds["steps"]
        self._seconds["lost"] += self._seconds["steps"] - useful
        self._seconds["steps"] = useful
        self._marks = {at: self._marks[at] for at in kept}

    def beat(self) -> None:
        """Writes, if it is long ago."""
        if time.monotonic() - self._wrote > EVERY:
            self.write()

    def write(self) -> None:
        self.turn(self._kind)
        self._wrote = time.monotonic()
        if self._file is None:
            return
        found = {
            "starts": self._starts,
            "until": time.time(),
            "seconds": self._seconds,
            "marks": self._marks,
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._file)

    def metrics(self) -> dict[str, float]:
        """goodput/<kind>: shares of goodput/wall_seconds, which is since the first start."""
        self.turn(self._kind)
        wall = sum(self._seconds.values())
        shares = {f"goodput/{k}": seconds / wall for k, seconds in self._seconds.items()}
        return shares | {"goodput/wall_seconds": wall}

    def table(self) -> str:
        """The same for people."""
        self.turn(self._kind)
        wall = sum(self._seconds.values())
        good = sum(self._seconds[kind] for kind in GOOD)
        starts = "one start" if self._starts == 1 else f"{self._starts} starts"
        lines = [f"goodput: {good / wall:.1%} of {wall:,.1f} s since the run first began, {starts}"]
        for kind, seconds in self._seconds.items():
            if seconds or kind != "sampling":
                lines.append(f"  {kind:<11}{seconds:>12,.1f} s {seconds / wall:>7.1%}")
        return "\n".join(lines)
