"""Which parameters are trained: the others stand apart, and are joined again where the model runs.

What is trained is in the state (with its gradients, its optimiser state, its checkpoints); what is
frozen is beside it. Where all is trained there is nothing beside it.
"""

from __future__ import annotations

import math
from typing import Any

from posttrain.config import ConfigError
from posttrain.models.lora import is_adapter
from posttrain.models.nested import Rule, flat, matches
from posttrain.train.config import TrainConfig

ADAPTED = ("score",)
"""What is trained beside adapters unasked: a head that the base model has not."""


def trained_rule(cfg: TrainConfig, params: Any, *, adapters: bool = False) -> Rule:
    """Which of these parameters a config trains; with adapters, they and what `trainable` adds.

    ConfigError where it names none of them.
    """
    paths = [path for path, _ in flat(params)]
    chosen, frozen = cfg.trainable, cfg.frozen or ()
    wrong = [
        f"train.{field}: {pattern!r} is no parameter's name"
        for field, patterns in (("trainable", chosen or ()), ("frozen", frozen))
        for pattern in patterns
        if not any(matches(path, pattern) for path in paths)
    ]

    def rule(path: str) -> bool:
        kept = any(matches(path, pattern) for pattern in chosen or ())
        kept |= (is_adapter(path) or path in ADAPTED) if adapters else chosen is None
        return kept and not any(matches(path, pattern) for pattern in frozen)

    if not wrong and not any(map(rule, paths)):
        wrong = ["train.trainable and train.frozen leave nothing to train"]
    if wrong:
        raise ConfigError("\n    ".join([*wrong, "there are: " + ", ".join(sorted(paths))]))
    return rule


def describe(trained: Any, frozen: Any) -> str:
    """One line: how many of the parameters are trained."""
    trains, stays = (
        sum(math.prod(leaf.shape) for _, leaf in flat(part)) for part in (trained, frozen)
    )
    return f"trained: {trains:,} of {trains + stays:,} parameters ({trains / (trains + stays):.2%})"
