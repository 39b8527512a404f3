"""Preference optimisation: a tuned model and judged answers -> a model that prefers the better.

Answers come in pairs, or labelled good or bad one by one: the loss decides (docs/losses.md).
Prepares them (once: there is a cache), computes what the reference says of them (once, too: the
parameters that training starts from, frozen; not where the loss needs none), plans every batch,
trains, evaluates on held-out data of the same kind, keeps checkpoints, and at the end writes
<run_dir>/export, a Hugging Face folder.
Start it again and it goes on where it was, the reference's pass included. With a section `lora` it
trains adapters and leaves them in <run_dir>/adapter too. It leaves out rewards that answers are
sampled for: that is another job.
    posttrain preference configs/preference/qwen_hh_rlhf.yaml model.path=MODEL run_dir=runs/first
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import model_validator

from posttrain.chat.template import ChatConfig
from posttrain.checkpoint import CheckpointConfig, RunDir
from posttrain.config import Config as Section
from posttrain.config import runtime, semantic, variant
from posttrain.data.config import DataConfig
from posttrain.data.plan import BatchConfig
from posttrain.hosts import DistributedConfig
from posttrain.losses.base import PreferenceLoss
from posttrain.losses.dpo import DPO
from posttrain.losses.mixture import PREFERENCE_LOSSES
from posttrain.metrics import LogConfig
from posttrain.models.lora import LoraConfig
from posttrain.models.spec import ModelConfig
from posttrain.optim import OptimConfig
from posttrain.sharding import MeshConfig
from posttrain.train.config import EvalConfig, FaultsConfig, ReferenceSync, TrainConfig


class Config(Section):
    """The whole of a preference run."""

    job: Literal["preference"] = semantic("preference", help="names the job")
    run_dir: RunDir = runtime(
        Path("runs/preference"), help="the run's folder: checkpoints, metrics, export"
    )
    seed: int = semantic(0, ge=0, help="of the order of the data")
    model: ModelConfig = semantic(help="what is trained; as it is before, it is the reference")
    lora: LoraConfig | None = semantic(None, help="adapters, trained instead of the model")
    chat: ChatConfig = semantic(ChatConfig(), help="how conversations become tokens")
    data: DataConfig = semantic(help="the pairs, or labelled answers, it is trained on")
    batch: BatchConfig = semantic(help="what one optimiser step holds; a pair is an example")
    loss: Annotated[PreferenceLoss, variant(PREFERENCE_LOSSES, "dpo")] = semantic(
        DPO(), help="what is minimised"
    )
    reference: Literal["cached", "live"] = runtime(
        "cached",
        help="cached: its log-probs are computed once, before training, and kept with the data; "
        "live: computed in every step, from a second set of weights",
    )
    reference_sync: ReferenceSync | None = semantic(
        None, help="the reference follows the policy, with reference: live (TR-DPO); none: it stays"
    )
    optim: OptimConfig = semantic(OptimConfig(), help="how")
    train: TrainConfig = semantic(TrainConfig(), help="how long")
    eval: EvalConfig = runtime(EvalConfig(), help="held-out sets")
    mesh: MeshConfig = runtime(MeshConfig(), help="how devices are laid out")
    distributed: DistributedConfig = runtime(DistributedConfig(), help="how processes meet")
    checkpoint: CheckpointConfig = semantic(CheckpointConfig(), help="saving and resuming")
    faults: FaultsConfig = semantic(FaultsConfig(), help="what becomes of a run that goes wrong")
    log: LogConfig = runtime(LogConfig(), help="metrics")
    export: bool = runtime(True, help="write <run_dir>/export, a Hugging Face folder, at the end")

    @model_validator(mode="after")
    def _what_follows_is_live(self) -> Config:
        if self.reference_sync is None:
            return self
        if "reference_logps" not in self.loss.needs:
            raise ValueError(f"reference_sync: {type(self.loss).__name__} asks no reference")
        if self.reference == "cached":
            raise ValueError(
                "reference_sync: what reference: cached holds is said by a reference that stays as "
                "it is: set reference: live, or leave reference_sync out"
            )
        if self.lora is not None and self.reference_sync.mixup < 1:
            raise ValueError(
                "reference_sync.mixup: adapters are trained: a mean of their factors is not the "
                "adapter of the mean. Set mixup: 1 (the reference becomes the policy)"
            )
        return self


def setup_of(cfg: Config) -> dict[str, Any]:
    """What posttrain.train.setup is told beside the config."""
    return {"kind": cfg.loss.data, "reference": cfg.reference_sync or cfg.reference}


def run(cfg: Config) -> int:
    """Exit code: 0 done, 75 told to stop and saved. Raises ValueError on what the user can mend."""
    from posttrain.train import setup  # flax, orbax and grain load here, not for --help

    return setup.run(cfg, **setup_of(cfg))
