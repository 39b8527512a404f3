"""How well a model does a task: its answers, judged by the task's rewards.

Each held-out prompt is answered n times; printed are the mean rewards by part with their standard
errors over prompts, and of several answers pass@k (one of k is right), maj@n (the answer that most
agree on) and best@n (the one with the highest reward). It leaves out the judging of chats and the
standard suites of questions: it measures what `posttrain rl` trains.

    posttrain evaluate model.path=MODEL task.type=gsm8k task.held_out_path=TEST.jsonl n=8
"""

from __future__ import annotations

from typing import Literal

from posttrain.config import semantic
from posttrain.jobs.rejection import Answering, each_prompt, open_answerer, prompts_of
from posttrain.tasks.base import Split
from posttrain.types import Rollout


class Config(Answering):
    """Answers that are judged and counted."""

    job: Literal["evaluate"] = semantic("evaluate", help="names the job")
    split: Split = semantic("held_out", help="of the task's prompts: train or held_out")
    n: int = semantic(1, ge=1, help="answers to each prompt")


def run(cfg: Config) -> int:
    """The exit code: 0. ValueError on what the user can mend."""
    from posttrain.agree import agree_on_run
    from posttrain.checkpoint import is_primary
    from posttrain.hosts import init_distributed
    from posttrain.sampling.tally import counts, told

    init_distributed(cfg.distributed)
    agree_on_run(cfg, cfg.distributed.join_seconds)
    prompts = prompts_of(cfg)
    lines = []

    def done(index: int, rollouts: list[Rollout]) -> None:
        lines.append(counts(rollouts, cfg.right_part, cfg.right_at_least))

    each_prompt(cfg, prompts, open_answerer(cfg, prompts), done if is_primary() else None)
    for line in told(lines) if is_primary() else ():
        print(line)
    return 0
