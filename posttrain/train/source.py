"""Where the loop's batches come from: a plan of prepared data, or answers that are sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.train.throughput import StepSize
from posttrain.types import Batch


@dataclass(frozen=True)
class Told:
    """What a source says of the batch that it gave last.

    epochs: passes over the data, or prompts, that are seen once the step is done. metrics: what
    only the source knows. apart: seconds that making the batch took beside the training, where
    devices had other work (sampling); no rate of the training counts them.
    examples: their ids in the prepared data, where that is where they are from.
    """

    size: StepSize
    epochs: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    apart: float | None = None
    examples: Sequence[int] = ()


class Stopped(Exception):
    """The run was told to stop while answers were sampled; nothing of them is kept."""


class BatchSource(Protocol):
    """Gives the batch of each step in turn, from the one on that it was made to start at."""

    @property
    def waited(self) -> float:
        """Seconds that next() stood still, from the start on."""
        ...

    @property
    def ahead(self) -> int:
        """How many steps' metrics may still be unread when the next batch is asked for: 1 keeps
        the devices busy; 0 where that batch is made of what those steps made."""
        ...

    def watch(self, stopped: Callable[[], bool]) -> None:
        """What takes its time asks it now and then, and raises Stopped at a yes. All processes must
        ask the same number of times. Said once, before the first next()."""
        ...

    def next(self, state: Any) -> Batch:
        """The next step's batch, global arrays. state: what that step begins with."""
        ...

    def told(self) -> Told:
        """Of the batch given last."""
        ...

    def save(self, step: int) -> Mapping[str, Any]:
        """What a checkpoint after `step` updates has to hold for the source to go on: JSON."""
        ...

    def close(self) -> None:
        """Ends its threads."""
        ...
