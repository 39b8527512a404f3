"""The steps of a run that learns online: the policy's, and before it the critic's, on one batch.

Each is the one train step (step.py) with its own Forward and optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import optax

from posttrain import optim
from posttrain.metrics import Metrics
from posttrain.train.online_config import CriticConfig
from posttrain.train.state import TrainState
from posttrain.train.step import Forward, train_step_fn
from posttrain.types import Batch

Step = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]
"""(state, batch, frozen parameters) -> (state, metrics). The state is donated."""


@dataclass(frozen=True)
class Critic:
    cfg: CriticConfig
    forward: Forward

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """For a run of so many steps; its schedule spans all of them (PITFALL: a value head that
        is left out of the schedule)."""
        return optim.make_optimizer(self.cfg.optim, steps)


def make_steps(
    cfg: Any,
    forward: Forward,
    tx: optax.GradientTransformation,
    steps: int,
    state: TrainState,
    critic: Critic | None,
) -> Step:
    """The step of a run.

    The critic's metrics are reported under critic/, but for those that have a place of their own.
    """
    policy_alone = replace(state, critic=None)
    critic_step = None
    if critic is not None:
        assert state.critic is not None
        critic_step = train_step_fn(
            critic.forward,
            critic.optimizer(steps),
            optim.schedule(critic.cfg.optim, steps),
            critic.cfg.optim.clip_norm,
            state.critic,
        )

    rate, clip_norm = optim.schedule(cfg.optim, steps), cfg.optim.clip_norm
    policy_step = train_step_fn(forward, tx, rate, clip_norm, policy_alone)

    def step(state: TrainState, batch: Batch, frozen: Any) -> tuple[TrainState, Metrics]:
        following, learned = state.critic, {}
        if critic_step is not None:
            following, learned = critic_step(following, batch)
        state, metrics = policy_step(replace(state, critic=None), batch, None, frozen)
        return replace(state, critic=following), metrics | _of_critic(learned)

    return step


def _of_critic(metrics: Metrics) -> Metrics:
    # a Routing is told by names of its own, which are those of the policy's
    apart = {k: v for k, v in metrics.items() if k not in ("loss_by_source", "routing")}
    return {name if "/" in name else f"critic/{name}": value for name, value in apart.items()}
