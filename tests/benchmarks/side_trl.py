"""A run of TRL as a process that is measured: `python -m tests.benchmarks.side_trl OUT settings`.

settings is JSON: {"trainer": "sft" | "dpo" | "grpo", "model": folder, "rows": file, "args": {...},
"reward": pattern}, args as of TRL's SFTConfig, DPOConfig or GRPOConfig; the pattern is what an
answer must begin with to earn 1. float32, no gradient checkpointing, attention by torch's sdpa.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from tests.benchmarks.clock import Clock

SHARED = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "eval_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}


def main() -> int:
    out, settings = sys.argv[1], json.loads(sys.argv[2])
    clock = Clock()
    from datasets import load_dataset
    from transformers import TrainerCallback

    counts = {"examples": 0, "tokens": 0, "trained": 0, "sampled": 0}

    class Steps(TrainerCallback):
        """A step is done when its update is; its counts were added by the trainer below."""

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            clock.mark("gradient")

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            clock.mark("updated")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step(**counts)
            counts.update(dict.fromkeys(counts, 0))

    trainer_type, config = trainer_of(settings["trainer"])
    rewards = {} if settings["trainer"] != "grpo" else {"reward_funcs": reward(settings["reward"])}

    class Counting(trainer_type):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            if not rewards:  # else these are prompts, perhaps answered already
                add(inputs, counts)
            return super().training_step(model, inputs, *rest)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            found = super()._generate_and_score_completions(inputs)
            sampled = int(found["completion_mask"].sum())
            counts["examples"] += len(found["completion_mask"])
            counts["tokens"] += int(found["prompt_mask"].sum()) + sampled
            counts["trained"] += sampled
            counts["sampled"] += sampled
            clock.mark("sampled")
            return found

        def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
            found = super().compute_ref_log_probs(model, inputs)
            clock.mark("reference", pairs=len(inputs["input_ids"]) // 2)
            return found

    trainer = Counting(
        model=settings["model"],
        args=config(
            **SHARED,
            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
            **settings["args"],
        ),
        train_dataset=load_dataset("json", data_files=settings["rows"], split="train"),
        callbacks=[Steps()],
        **rewards,
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    for step, loss in zip(clock.steps, losses, strict=True):
        step["loss"] = float(loss)
    clock.write(out)
    return 0


def trainer_of(name: str) -> tuple[type[Any], type[Any]]:
    """(trainer, its config): no more of TRL is imported than is run."""
    if name == "sft":
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        return SFTTrainer, SFTConfig
    if name == "dpo":
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        return DPOTrainer, DPOConfig
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOTrainer, GRPOConfig


def reward(pattern: str) -> Any:
    """As GRPOTrainer asks for it: of answers, each a list of messages."""
    begins = re.compile(rf"\s*{pattern}")

    def judge(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
        return [float(begins.match(said["content"]) is not None) for (said,) in completions]

    return judge


def add(inputs: dict[str, Any], counts: dict[str, int]) -> None:
    """Adds what a micro-batch of TRL's holds: examples (or pairs), tokens, tokens in the loss."""
    if "completion_mask" in inputs:  # DPO: all chosen, then all rejected
        counts["trained"] += int(inputs["completion_mask"][:, 1:].sum())
        counts["tokens"] += int(inputs["attention_mask"].sum())
        counts["examples"] += len(inputs["input_ids"]) // 2
        return
    counts["trained"] += int((inputs["labels"][:, 1:] != -100).sum())
    positions = inputs.get("position_ids")
    if positions is None:
        counts["tokens"] += int(inputs["attention_mask"].sum())
        counts["examples"] += len(inputs["labels"])
    else:  # padding-free: every position is a token, each 0 starts an example
        counts["tokens"] += positions.numel()
        counts["examples"] += int((positions == 0).sum())


if __name__ == "__main__":
    sys.exit(main())
