"""Learning online: a tuned model and a task -> a model that earns more of the task's rewards.

In rounds: the policy answers prompts of the task, rewards judge the answers (while others are still
being sampled), advantages say how much better each was than expected, and a few optimiser steps
make the better ones more probable. A critic, a KL to the parameters that training starts from,
replacement of prompts that teach nothing: each is a section or a key; `preset:` fills those that
are not set with a published recipe's (docs/rl.md lists them). Evaluates on held-out prompts, writes
answers down (`posttrain report rollouts RUN`), keeps checkpoints, and at the end writes
<run_dir>/export, a Hugging Face folder. Start it again and it goes on where it was, in the middle
of a round too. With a section `lora` it trains adapters and leaves them in <run_dir>/adapter too.
It leaves out sampling that runs ahead of the training, and sampling on other machines.

    posttrain rl configs/rl/qwen_gsm8k_grpo.yaml model.path=MODEL run_dir=runs/first
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import model_validator

from posttrain.advantages import ADVANTAGES
from posttrain.advantages.base import Advantage
from posttrain.advantages.grpo import GRPO
from posttrain.chat.template import ChatConfig
from posttrain.checkpoint import CheckpointConfig, RunDir
from posttrain.config import Config as Section
from posttrain.config import did_you_mean, runtime, semantic, variant
from posttrain.hosts import DistributedConfig
from posttrain.losses import POLICY_LOSSES
from posttrain.losses.clip import Clip
from posttrain.losses.kl import KL
from posttrain.losses.policy_loss import PolicyLoss
from posttrain.metrics import LogConfig
from posttrain.models.lora import LoraConfig
from posttrain.models.spec import ModelConfig
from posttrain.rewards.total import RewardParts, Shaping, check
from posttrain.sampling.request import Sampling
from posttrain.sharding import MeshConfig
from posttrain.tasks import TASKS
from posttrain.tasks.base import Task
from posttrain.tools import ToolsConfig
from posttrain.train.config import FaultsConfig, TrainConfig
from posttrain.train.online_config import (
    CriticConfig,
    OnlineEvalConfig,
    PolicyOptimConfig,
    RolloutLogConfig,
    RoundConfig,
)
from posttrain.train.recipes import RECIPES

_TASK = variant(TASKS, None)


class Config(Section):
    """The whole of a run that learns online."""

    job: Literal["rl"] = semantic("rl", help="names the job")
    preset: str | None = runtime(
        None, help=f"fills what is not set by a published recipe: {', '.join(RECIPES)}"
    )
    run_dir: RunDir = runtime(
        Path("runs/rl"), help="the run's folder: checkpoints, metrics, rollouts, export"
    )
    seed: int = semantic(0, ge=0, help="of the order of prompts and of every draw")
    model: ModelConfig = semantic(help="what is trained; as it is before, it is the reference")
    lora: LoraConfig | None = semantic(None, help="adapters, trained instead of the model")
    chat: ChatConfig = semantic(ChatConfig(), help="how prompts become tokens")
    task: Annotated[Task, _TASK] = semantic(help="the prompts, and what their answers should be")
    tools: ToolsConfig = semantic(ToolsConfig(), help="what the model may call")
    sampling: Sampling = semantic(Sampling(), help="how answers are drawn")
    rewards: RewardParts = semantic({}, help="name -> {type, weight, ...}; none = the task's own")
    shaping: Shaping = semantic(Shaping(), help="how the parts become one reward")
    round: RoundConfig = semantic(RoundConfig(), help="what one round holds")
    advantage: Annotated[Advantage, variant(ADVANTAGES, "grpo")] = semantic(
        GRPO(), help="how much better an answer was than expected"
    )
    loss: Annotated[PolicyLoss, variant(POLICY_LOSSES, "clip")] = semantic(
        Clip(), help="what the policy makes of that"
    )
    kl: KL = semantic(KL(), help="what holds the policy to the reference")
    critic: CriticConfig | None = semantic(None, help="foretells returns (advantage: gae)")
    optim: PolicyOptimConfig = semantic(PolicyOptimConfig(), help="how")
    train: TrainConfig = semantic(TrainConfig(), help="how long; epochs are of the prompts")
    eval: OnlineEvalConfig = runtime(OnlineEvalConfig(), help="held-out prompts")
    rollouts: RolloutLogConfig = runtime(RolloutLogConfig(), help="answers written down")
    mesh: MeshConfig = runtime(MeshConfig(), help="how devices are laid out")
    distributed: DistributedConfig = runtime(DistributedConfig(), help="how processes meet")
    checkpoint: CheckpointConfig = semantic(CheckpointConfig(), help="saving and resuming")
    faults: FaultsConfig = semantic(FaultsConfig(), help="what becomes of a run that goes wrong")
    log: LogConfig = runtime(LogConfig(), help="metrics")
    export: bool = runtime(True, help="write <run_dir>/export, a Hugging Face folder, at the end")

    @property
    def right(self) -> str:
        """The part of the rewards that says whether an answer is right; "": none does."""
        return self.round.right or (self.task.right if self.task.right in self.rewards else "")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """The preset's keys, and the task's rewards, where the user set none."""
        if not isinstance(given, Mapping):
            return given
        filled = dict(given)
        recipe = RECIPES.get(filled.get("preset") or "")
        added = recipe.parts(_longest(filled)) if recipe else {}
        parts = filled.get("rewards") or {}
        if isinstance(parts, Mapping):
            named = {**parts}
            if not {*named} - {*added} and (task := _task_of(filled.get("task"))) is not None:
                named = {**{name: dict(part) for name, part in task.rewards.items()}, **named}
            if {*named} - {*added}:  # a recipe's part is no reward to be had alone
                for name, keys in added.items():
                    named[name] = _under(named.get(name), keys)
            filled["rewards"] = named
        for section, keys in recipe.keys.items() if recipe else ():
            filled[section] = _under(filled.get(section), keys)
        return filled

    @model_validator(mode="after")
    def _fits(self) -> Config:
        wrong = [*self._wrong_names(), *self._wrong_parts()]
        try:
            check(self.rewards)
        except ValueError as error:
            wrong.append(str(error))
        room = self.round.seq_len - self.sampling.max_new_tokens
        if room < 1:
            wrong.append(
                f"sampling.max_new_tokens is {self.sampling.max_new_tokens} and round.seq_len "
                f"{self.round.seq_len}: nothing is left for the prompt"
            )
        if wrong:
            raise ValueError("\n    ".join(wrong))
        return self

    def _wrong_names(self) -> list[str]:
        wrong = []
        if self.preset is not None and self.preset not in RECIPES:
            hint = did_you_mean(self.preset, list(RECIPES)) or f"; known: {', '.join(RECIPES)}"
            wrong.append(f"preset: no recipe {self.preset!r}{hint}")
        if self.round.right and self.round.right not in self.rewards:
            hint = did_you_mean(self.round.right, list(self.rewards))
            wrong.append(f"round.right: no part of rewards is {self.round.right!r}{hint}")
        if self.round.resample and self.round.resample_by == "right" and not self.right:
            wrong.append(
                "round.resample_by is right, and no part of rewards says what right is: name one "
                "in round.right, or set round.resample_by: reward"
            )
        return wrong

    def _wrong_parts(self) -> list[str]:
        """What does not go together."""
        wrong = []
        name = ADVANTAGES_BY_CLASS.get(type(self.advantage), type(self.advantage).__name__)
        if self.advantage.needs_values and self.critic is None:
            wrong.append(f"advantage type {name} asks a critic: set critic: {{}}")
        if self.advantage.needs_group and self.round.answers < 2:
            wrong.append(
                f"round.answers is {self.round.answers}: advantage type {name} sets an answer "
                "against the others to its prompt: ask for 2 or more"
            )
        if self.critic is not None and not self.advantage.needs_values:
            wrong.append(f"critic: advantage type {name} does not read what it foretells")
        if self.sampling.temperature == 0:
            wrong.append("sampling.temperature is 0: a group's answers would all be the same")
        if self.eval.prompts and self.eval.temperature == 0 and self.eval.answers > 1:
            wrong.append(
                f"eval.temperature is 0: all {self.eval.answers} of eval.answers would be the same"
            )
        if self.faults.goes_back:
            wrong.append(
                "faults.on_nonfinite, faults.on_spike: rollback leaves a batch of prepared data "
                "out; here batches are sampled by the policy that went wrong, and a round's other "
                "steps stand on it: set stop"
            )
        if self.lora is not None and self.lora.dropout:
            wrong.append("lora.dropout: answers are sampled without it: set it to 0")
        return wrong


ADVANTAGES_BY_CLASS = {made: name for name, made in ADVANTAGES.items()}


def _under(given: Any, keys: Mapping[str, Any]) -> Any:
    """A recipe's keys under those of the user; none of them where the user named another type."""
    if given is None:
        return dict(keys)
    if not isinstance(given, Mapping):
        return given
    if "type" in given and given["type"] != keys.get("type", given["type"]):
        return given
    return {**keys, **given}


def _longest(given: Mapping[str, Any]) -> int:
    """sampling.max_new_tokens, where it is a number; if not, that is told where it is read."""
    sampling = given.get("sampling")
    if isinstance(sampling, Sampling):
        return sampling.max_new_tokens
    found = sampling.get("max_new_tokens") if isinstance(sampling, Mapping) else None
    return found if isinstance(found, int) else Sampling().max_new_tokens


def _task_of(given: Any) -> Task | None:
    """The task, if what the user wrote is one; what is wrong with it is told where it is read."""
    if isinstance(given, Task):
        return given
    try:
        found = _TASK.validate(given, Task)
    except (ValueError, TypeError):
        return None
    return found if isinstance(found, Task) else None


def run(cfg: Config) -> int:
    """Exit code: 0 done, 75 told to stop and saved. Raises ValueError on what the user can mend."""
    from posttrain.train import setup_online  # flax and orbax load here, not for --help

    return setup_online.run(cfg)
