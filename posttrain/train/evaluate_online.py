"""Held-out prompts of a task, answered by the policy and judged as training's answers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.train.answering import Answering
from posttrain.train.answers import on_first
from posttrain.train.online import seed_of
from posttrain.train.rollout_log import write_rollouts
from posttrain.train.round_metrics import round_metrics
from posttrain.types import Prompt

_HELD_OUT = 1 << 30  # no round has this number: no draw is one of training's


class HeldOutPrompts:
    """The prompts, and how they are answered: with the draws of every other evaluation."""

    def __init__(self, answering: Answering, prompts: Sequence[Prompt], cfg: Any):
        self._answering, self._prompts, self._cfg = answering, prompts, cfg

    def measure(self, params: Any, step: int) -> dict[str, float]:
        """eval/<task>/{reward, accuracy, rewards/..., completions/...}; the answers are written to
        <run_dir>/rollouts/<step>.held_out.jsonl."""
        cfg = self._cfg
        self._answering.update(params, step)
        answered = self._answering(
            self._prompts,
            cfg.sampling.model_copy(update={"temperature": cfg.eval.temperature}),
            n=cfg.eval.answers,
            seed=seed_of(cfg.seed, _HELD_OUT),
        )
        if cfg.rollouts.every is not None:
            path = cfg.run_dir / "rollouts" / f"{step}.held_out.jsonl"
            decode = self._answering.decode if cfg.rollouts.tokens else None
            on_first(lambda: write_rollouts(path, answered.rollouts, decode=decode))
        found = round_metrics(answered.rollouts, cfg.right)
        found["sampled_tokens_per_second"] = answered.tokens / max(answered.sampling, 1e-9)
        return {f"eval/{cfg.task.name}/{name}": value for name, value in found.items()}
