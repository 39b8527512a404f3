"""What a run left, for people: the answers that it sampled, with what they earned.

    posttrain report rollouts runs/first
    posttrain report rollouts runs/first step=41 sort=worst show=8
    posttrain report rollouts runs/first page=answers.html held_out=true

`rollouts` shows the answers of one step on the terminal and writes a page of all steps, one file
without scripts: rewards by part, advantages, and each token's log-probs where they were kept
(rollouts.tokens). It reads files alone: no model, no JAX.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from posttrain.config import Config as Section
from posttrain.config import ConfigError, runtime

ACTIONS = {"rollouts": "answers that a run of `posttrain rl` wrote down, here and as a page"}
WORD = "run"
"""The key that a word alone sets."""


class Config(Section):
    """What to show of which run."""

    job: Literal["report"] = runtime("report", help="names the job")
    run: Path = runtime(help="the run's folder")
    step: int | None = runtime(None, help="whose answers are shown; none = the last that are there")
    held_out: bool = runtime(False, help="answers to held-out prompts, of evaluations")
    show: int = runtime(3, ge=0, help="groups that are shown on the terminal")
    sort: Literal["order", "best", "worst", "spread"] = runtime(
        "order", help="which groups first: as sampled, by mean reward, by difference of rewards"
    )
    groups: int = runtime(16, gt=0, help="groups of each step that the page has")
    page: Path | None = runtime(None, help="HTML file; none = <run>/rollouts.html")


def run(cfg: Config, action: str) -> int:
    """0. ConfigError: nothing of that kind is there."""
    from rich.console import Console

    from posttrain.report import rollouts

    files = rollouts.steps_of(cfg.run, held_out=cfg.held_out)
    step = max(files) if cfg.step is None else cfg.step
    if step not in files:
        raise ConfigError(f"step {step}: answers are there of steps {', '.join(map(str, files))}")
    groups = {k: rollouts.read(file, cfg.sort) for k, file in files.items()}
    page = cfg.page or cfg.run / "rollouts.html"  # first: who reads on may close the terminal
    page.write_text(rollouts.page(cfg.run, groups, cfg.groups), encoding="utf-8")
    rollouts.show(Console(), step, groups[step], cfg.show)
    print(f"{len(files)} steps as a page: {page}")
    return 0
