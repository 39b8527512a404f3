"""A reward model: a tuned model and pairs of answers -> a scorer that ranks the chosen ones first.

The vocabulary head gives way to a scalar one, which reads each conversation at its last token.
Prepares the pairs (once: there is a cache), plans every batch, trains, measures held-out pairs
(accuracy, margin, calibration, how far scores follow length), keeps checkpoints, and at the end
writes <run_dir>/export, a folder for transformers' AutoModelForSequenceClassification and for
`posttrain score`. Start it again and it goes on where it was. With a section `lora` it trains
adapters beside the score head and leaves both in <run_dir>/adapter too. It leaves out rewards of
single steps, several labels, and rewards by regression on scores.

    posttrain reward_model configs/reward_model/qwen_ultrafeedback.yaml model.path=MODEL
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from posttrain.chat.template import ChatConfig
from posttrain.checkpoint import CheckpointConfig, RunDir
from posttrain.config import Config as Section
from posttrain.config import runtime, semantic, variant
from posttrain.data.config import DataConfig
from posttrain.data.plan import BatchConfig
from posttrain.hosts import DistributedConfig
from posttrain.losses import REWARD_LOSSES
from posttrain.losses.bradley_terry import BradleyTerry
from posttrain.metrics import LogConfig
from posttrain.models.lora import LoraConfig
from posttrain.models.spec import ModelConfig
from posttrain.optim import OptimConfig
from posttrain.sharding import MeshConfig
from posttrain.train.config import FaultsConfig, HeldOutConfig, TrainConfig


class Config(Section):
    """The whole of a reward model's run."""

    job: Literal["reward_model"] = semantic("reward_model", help="names the job")
    run_dir: RunDir = runtime(
        Path("runs/reward_model"), help="the run's folder: checkpoints, metrics, export"
    )
    seed: int = semantic(0, ge=0, help="of the order of pairs")
    model: ModelConfig = semantic(
        help="what is trained; a score head that it lacks begins random, by init_seed"
    )
    lora: LoraConfig | None = semantic(None, help="adapters, trained instead of the model")
    chat: ChatConfig = semantic(ChatConfig(), help="how conversations become tokens")
    data: DataConfig = semantic(help="the pairs it is trained on")
    batch: BatchConfig = semantic(help="what one optimiser step holds; examples are pairs")
    loss: Annotated[Section, variant(REWARD_LOSSES, "bradley_terry")] = semantic(
        BradleyTerry(), help="what is minimised"
    )
    optim: OptimConfig = semantic(OptimConfig(), help="how")
    train: TrainConfig = semantic(TrainConfig(), help="how long")
    eval: HeldOutConfig = runtime(HeldOutConfig(), help="held-out sets of pairs")
    mesh: MeshConfig = runtime(MeshConfig(), help="how devices are laid out")
    distributed: DistributedConfig = runtime(DistributedConfig(), help="how processes meet")
    checkpoint: CheckpointConfig = semantic(CheckpointConfig(), help="saving and resuming")
    faults: FaultsConfig = semantic(FaultsConfig(), help="what becomes of a run that goes wrong")
    log: LogConfig = runtime(LogConfig(), help="metrics")
    export: bool = runtime(True, help="write <run_dir>/export, a Hugging Face folder, at the end")


def setup_of(_: Config) -> dict[str, Any]:
    """What posttrain.train.setup is told beside the config."""
    return {"kind": "pairs", "head": "score"}


def run(cfg: Config) -> int:
    """Exit code: 0 done, 75 told to stop and saved. Raises ValueError on what the user can mend."""
    from posttrain.train import setup  # flax, orbax and grain load here, not for --help

    return setup.run(cfg, **setup_of(cfg))
