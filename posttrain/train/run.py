"""What the training loop works with: a run that a job has put together, and steps under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import metrics as reporting
from posttrain.checkpoint import Checkpoints
from posttrain.metrics import LogConfig, Writer
from posttrain.models.spec import Spec
from posttrain.train.config import FaultsConfig
from posttrain.train.source import BatchSource, Told


@dataclass(frozen=True)
class Run:
    """All that the loop needs; the job puts it together."""

    folder: Path
    spec: Spec
    train_step: Callable[..., tuple[Any, reporting.Metrics]]
    """(state, batch, reference, frozen) -> (state, metrics); a state has a `step`."""
    reference: Any
    """The parameters of a live reference; None: there is none."""
    synced: bool
    """Whether there is one in the state instead."""
    frozen: Any
    """The parameters that are not trained."""
    adapters: bool
    """Whether the model is among these, and adapters are trained."""
    source: BatchSource
    total_steps: int
    source_names: list[str]
    checkpoints: Checkpoints
    writer: Writer
    log: LogConfig
    evaluate: Callable[[Any, int], dict[str, float]] | None
    """(state, step) -> metrics; called every eval_every steps and at the end."""
    eval_every: int | None
    tokens_before: int
    """Non-padding tokens of the steps that an earlier start of the run made, where its checkpoint
    does not say."""
    faults: FaultsConfig
    began: float
    """When this start did, by time.monotonic."""
    seek: Callable[[int], None] | None = None
    """Makes the source go on with the batch after so many updates; None: it cannot go back."""


@dataclass
class Step:
    """A dispatched step whose metrics were not read yet."""

    number: int
    metrics: reporting.Metrics
    told: Told
    waited: float
