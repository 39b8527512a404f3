"""The critic's own optimiser."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from posttrain.optim import schedule
from posttrain.train.online_config import CriticConfig, CriticOptimConfig
from posttrain.train.online_steps import Critic, _of_critic


def test_pitfall_27_the_value_head_follows_its_schedule() -> None:
    """Of a gradient that stays, Adam's updates are as large as the rate is."""
    steps = 6
    cfg = CriticConfig(optim=CriticOptimConfig(lr=0.1, schedule="linear", warmup=2))

    never: Any = None
    tx = Critic(cfg, never).optimizer(steps)
    params: Any = {"score": jnp.ones((3, 1))}
    state: Any = tx.init(params)
    moves = []
    for _ in range(steps):
        updates: Any
        updates, state = tx.update(params, state, params)
        moves.append(-float(updates["score"][0, 0]))
    rate = schedule(cfg.optim, steps)
    np.testing.assert_allclose(moves, [float(rate(k)) for k in range(steps)], rtol=1e-4)
    np.testing.assert_allclose(moves, [0.05, 0.1, 0.1, 0.075, 0.05, 0.025], rtol=1e-4)


def test_the_routers_of_a_critic_are_not_told_as_those_of_the_policy() -> None:
    found = _of_critic({"loss": 1.0, "loss/value_avg": 2.0, "routing": 3.0, "loss_by_source": 4.0})
    assert found == {"critic/loss": 1.0, "loss/value_avg": 2.0}
