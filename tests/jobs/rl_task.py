"""A task for tests: say numbers; the more of the answer's tokens are of one kind, the better."""

from __future__ import annotations

import os
import random
from typing import ClassVar

from posttrain.tasks.base import Generated, Question, Rewards
from posttrain.types import Rollout

HERE = "tests.jobs.rl_task"
RL_KEYS = [
    *("model.dtype=float32", "model.remat=none", f"task.type={HERE}:Letters", "task.size=64"),
    *("sampling.max_new_tokens=8", "round.prompts=4", "round.answers=4", "round.seq_len=64"),
    *("round.micro_tokens=256", "round.slots=8", "optim.lr=3e-3", "optim.warmup=0"),
    *("eval.prompts=0", "log.tensorboard=false", "rollouts.every=null", "export=false"),
]
"""Small and quick, nothing but the steps."""


class Letters(Generated):
    """The reward is the share of sampled ids that are in the lower half, which a random model's
    are half of the time."""

    name = "letters"
    rewards: ClassVar[Rewards] = {"share": {"type": f"{HERE}:share"}}

    def draw(self, rng: random.Random) -> Question | None:
        return Question(f"Say {rng.randint(0, 999)}", answer="low")


def share(rollout: Rollout) -> float:
    """Of sampled ids, how many are under 3,200 of 6,400."""
    sampled = rollout.tokens[rollout.loss_weights > 0]
    return float((sampled < 3200).mean()) if len(sampled) else 0.0


def half_of_them(rollout: Rollout) -> float | None:
    """Judges those answers alone whose ids have an even sum."""
    return None if rollout.tokens.sum() % 2 else share(rollout)


def flat_or_not(rollout: Rollout) -> float:
    """The same for all answers to a prompt with an even number; else `share`."""
    number = int(str(rollout.prompt.messages[-1]["content"]).split()[-1])
    return share(rollout) if number % 2 else 0.5


def share_told(rollout: Rollout) -> float:
    """`share`, which leaves the number of its process in the file that TOLD names."""
    with open(os.environ["TOLD"], "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    return share(rollout)
