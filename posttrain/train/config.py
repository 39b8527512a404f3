"""How long training goes on, what of the model is trained, and what is measured on the way."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from posttrain.config import Config, runtime, semantic
from posttrain.data.config import Sources


class TrainConfig(Config):
    """How long to train, and which parameters."""

    epochs: int | None = semantic(None, gt=0, help="passes over the data; 1 if steps is not set")
    steps: int | None = semantic(None, gt=0, help="optimiser steps, instead of epochs")
    head_chunk: int = runtime(256, gt=0, help="trained tokens per chunk of the vocabulary head")

    trainable: tuple[str, ...] | None = semantic(
        None, help="patterns of the parameters to train, as layers/*; none = all, or lora's"
    )
    frozen: tuple[str, ...] | None = semantic(
        None, help="patterns of parameters, as embedding or *norm, that stay as they are"
    )

    router_balance: float = semantic(
        0.0, ge=0, help="of a mixture of experts: weight of its router's balance loss"
    )
    router_z: float = semantic(0.0, ge=0, help="likewise of its z loss")

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps are both set: keep one")
        return self


class FaultsConfig(Config):
    """What becomes of a run in which something goes wrong (docs/faults.md).

    All of it may differ between two starts of a run: what was left out is in the run's folder.
    """

    on_nonfinite: Literal["stop", "rollback"] = semantic(
        "stop",
        help="a loss or gradient norm that is no number. stop: end the run; rollback: go back to "
        "the last checkpoint, and leave the step's batch out",
    )
    on_spike: Literal["ignore", "stop", "rollback"] = semantic(
        "ignore", help="likewise of one that is far above those before it"
    )
    spike_window: int = semantic(128, ge=8, help="steps before it that say what is usual")
    spike_deviations: float = semantic(
        10.0, gt=0, help="how far above their median: in 1.4826 x median absolute deviations"
    )
    max_rollbacks: int = runtime(3, gt=0, help="in all of the run; at the next it stops")
    watchdog: float | None = runtime(
        1800.0,
        gt=0,
        help="seconds without a step, then all stacks are written and the run ends with exit code "
        "70, to be started again; none: never",
    )
    watchdog_slow: float = runtime(
        7200.0, gt=0, help="likewise while it compiles, saves, evaluates or makes a batch"
    )

    @property
    def goes_back(self) -> bool:
        return "rollback" in (self.on_nonfinite, self.on_spike)


class ReferenceSync(Config):
    """How the reference of a preference loss follows the policy (TR-DPO, train/sync.py)."""

    every: int = semantic(512, gt=0, help="optimiser steps between updates of the reference")
    mixup: float = semantic(
        0.6, gt=0, le=1, help="share of the policy in the new reference; 1: the policy itself"
    )


class HeldOutConfig(Config):
    """Held-out sets, each measured under its own name. Nothing of it changes the training."""

    sets: Sources = runtime({}, help="name -> source, as in data.sources")
    every: int | None = runtime(None, gt=0, help="steps between evaluations; none = at the end")


class EvalConfig(HeldOutConfig):
    """The same of a model that also writes, with answers of its own."""

    samples: int = runtime(2, ge=0, help="answers generated per set and evaluation, written down")
    max_new_tokens: int = runtime(128, gt=0, help="longest generated answer")
    temperature: float = runtime(0.0, ge=0, help="of generated answers; 0 = greedy")
