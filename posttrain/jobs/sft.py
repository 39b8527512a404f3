"""Supervised fine-tuning: a model folder and conversations -> a model that takes turns and stops.

Prepares the data (once: there is a cache), plans every batch, trains, evaluates on held-out sets,
keeps checkpoints, and at the end writes <run_dir>/export, a Hugging Face folder. Start it again
and it goes on where it was. With a section `lora` it trains adapters and leaves them in
<run_dir>/adapter too. It leaves out preferences and rewards: those are other jobs.
    posttrain sft configs/sft/llama_messages.yaml model.path=MODEL run_dir=runs/first
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from posttrain.chat.template import ChatConfig
from posttrain.checkpoint import CheckpointConfig, RunDir
from posttrain.config import Config as Section
from posttrain.config import runtime, semantic, variant
from posttrain.data.config import DataConfig
from posttrain.data.plan import BatchConfig
from posttrain.hosts import DistributedConfig
from posttrain.losses import LOSSES
from posttrain.losses.nll import NLL
from posttrain.metrics import LogConfig
from posttrain.models.lora import LoraConfig
from posttrain.models.spec import ModelConfig
from posttrain.optim import OptimConfig
from posttrain.sharding import MeshConfig
from posttrain.train.config import EvalConfig, FaultsConfig, TrainConfig


class Config(Section):
    """The whole of an SFT run."""

    job: Literal["sft"] = semantic("sft", help="names the job")
    run_dir: RunDir = runtime(
        Path("runs/sft"), help="the run's folder: checkpoints, metrics, export"
    )
    seed: int = semantic(0, ge=0, help="of the order of examples")
    model: ModelConfig = semantic(help="what is trained")
    lora: LoraConfig | None = semantic(None, help="adapters, trained instead of the model")
    chat: ChatConfig = semantic(ChatConfig(), help="how conversations become tokens")
    data: DataConfig = semantic(help="what it is trained on")
    batch: BatchConfig = semantic(help="what one optimiser step holds")
    loss: Annotated[Section, variant(LOSSES, "nll")] = semantic(NLL(), help="what is minimised")
    optim: OptimConfig = semantic(OptimConfig(), help="how")
    train: TrainConfig = semantic(TrainConfig(), help="how long")
    eval: EvalConfig = runtime(EvalConfig(), help="held-out sets")
    mesh: MeshConfig = runtime(MeshConfig(), help="how devices are laid out")
    distributed: DistributedConfig = runtime(DistributedConfig(), help="how processes meet")
    checkpoint: CheckpointConfig = semantic(CheckpointConfig(), help="saving and resuming")
    faults: FaultsConfig = semantic(FaultsConfig(), help="what becomes of a run that goes wrong")
    log: LogConfig = runtime(LogConfig(), help="metrics")
    export: bool = runtime(True, help="write <run_dir>/export, a Hugging Face folder, at the end")


def run(cfg: Config) -> int:
    """Exit code: 0 done, 75 told to stop and saved. Raises ValueError on what the user can mend."""
    from posttrain.train import setup  # flax, orbax and grain load here, not for --help

    return setup.run(cfg)
