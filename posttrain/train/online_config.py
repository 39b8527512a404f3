"""What a round of learning online holds, how its critic learns, and what is measured on the way."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from posttrain.config import Config, runtime, semantic, variant
from posttrain.losses import VALUE_LOSSES
from posttrain.losses.value import SquaredError
from posttrain.optim import OptimConfig


class RoundConfig(Config):
    """One round: prompts, answers to them by the policy as it is, and the steps made on these."""

    prompts: int = semantic(32, gt=0, help="prompts of a round")
    answers: int = semantic(8, gt=0, help="answers to each prompt: a group")
    steps: int = semantic(
        1, gt=0, help="optimiser steps that one pass over a round's answers is cut into"
    )
    passes: int = semantic(1, gt=0, help="passes over a round's answers")
    seq_len: int = semantic(
        1024, ge=8, help="most tokens of a prompt with its answer, and of one packed row"
    )
    order: Literal["shuffle", "sequential"] = semantic(
        "shuffle", help="shuffle the prompts anew in each epoch, or keep the order of the task"
    )
    resample: int = semantic(
        0,
        ge=0,
        help="how often groups without signal are replaced by other prompts' (DAPO's dynamic "
        "sampling); those that are left after that are kept",
    )
    resample_by: Literal["reward", "right"] = semantic(
        "reward",
        help="what is equal in a group without signal: the whole reward, or whether answers are "
        "right (all or none; DAPO), whatever the other parts of the reward say",
    )
    mask_truncated: bool = semantic(
        False, help="answers cut off at max_new_tokens are not trained on (they still are judged)"
    )
    right: str = semantic(
        "",
        help="the part of rewards that says whether an answer is right (1 or more), for metrics "
        'and resample_by; "" = the task\'s, mostly `correct`; without one no accuracy is told',
    )
    slots: int = runtime(64, gt=0, help="answers that are sampled at once")
    micro_tokens: int = runtime(
        16384, gt=0, help="most tokens of a micro-batch on one device, padding included"
    )

    @property
    def updates(self) -> int:
        """Optimiser steps of a round."""
        return self.steps * self.passes

    @model_validator(mode="after")
    def _answers_for_each_step(self) -> RoundConfig:
        if self.steps > self.prompts * self.answers:
            raise ValueError(
                f"steps is {self.steps}, and a round has {self.prompts * self.answers} answers: "
                "each step takes one at least"
            )
        return self


class PolicyOptimConfig(OptimConfig):
    """As of the other jobs, with a rate for whole models that learn online."""

    lr: float = semantic(1e-6, gt=0, help="peak learning rate; adapters take about ten times it")
    schedule: Literal["constant", "linear", "cosine", "wsd"] = semantic(
        "constant", help="after warm-up; wsd = constant, then linear decay over the last `decay`"
    )


class CriticOptimConfig(PolicyOptimConfig):
    """A critic learns faster than its policy."""

    lr: float = semantic(1e-5, gt=0, help="peak learning rate")


class CriticConfig(Config):
    """What foretells the return of each token: a model of its own, with an optimiser of its own."""

    path: str = semantic(
        "",
        help='Hugging Face folder that it starts from, a reward model\'s too; "" = model.path. '
        "Where that has no scalar head, one begins random, by model.init_seed",
    )
    loss: Annotated[Config, variant(VALUE_LOSSES, "squared")] = semantic(
        SquaredError(), help="what it minimises"
    )
    optim: CriticOptimConfig = semantic(CriticOptimConfig(), help="how")


class OnlineEvalConfig(Config):
    """Held-out prompts, answered and judged. Nothing of it changes the training."""

    prompts: int = runtime(128, ge=0, help="held-out prompts of the task; 0 = no evaluation")
    every: int | None = runtime(None, gt=0, help="steps between evaluations; none = at the end")
    first: bool = runtime(True, help="before the first step too")
    answers: int = runtime(1, gt=0, help="answers to each")
    temperature: float = runtime(1.0, ge=0, help="of these answers; 0 = greedy")


class RolloutLogConfig(Config):
    """Which rounds' answers are written down, for `posttrain report rollouts`."""

    every: int | None = runtime(
        10, gt=0, help="rounds between those whose answers are written; none = none are"
    )
    tokens: bool = runtime(True, help="with each token, its log-probs and its advantage")
