"""Reward models: the chosen answer gets the higher score, by the model of Bradley and Terry.

    p(chosen is preferred) = sigmoid(r(chosen) - r(rejected))
    loss = -log sigmoid(r(chosen) - r(rejected) - m) + c (r(chosen) + r(rejected))^2

Bradley and Terry 1952; for language models Ouyang et al. 2022 (arXiv:2203.02155), eq. 1. m is the
pair's margin, by how much somebody said that the chosen answer is the better one (Touvron et al.
2023, arXiv:2307.09288, eq. 2); 0 where the data have none. c keeps the rewards near 0 on average,
which differences alone leave open (Eisenstein et al. 2023, arXiv:2312.09244, eq. 2).
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from posttrain.config import Config, semantic
from posttrain.losses.pairs import find_sides
from posttrain.types import Batch, Extremes, Mean, Terms, TokenOutputs


class BradleyTerry(Config):
    """Bradley-Terry: the mean over pairs, in nats."""

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})

    centering: float = semantic(
        0.0,
        ge=0,
        help="weight of the squared sum of a pair's rewards (TRL: center_rewards_coefficient)",
    )

    def __call__(self, outputs: TokenOutputs, batch: Batch) -> Terms:
        """A term per pair, [P], each of weight 1.

        Metrics, under TRL's names: accuracy and margin, means over pairs of r(chosen) > r(rejected)
        and of their difference (the data's margin not taken off); mean_reward, min_reward and
        max_reward over all answers.
        """
        sides = find_sides(batch)
        rewards: Float[Array, "P 2"] = sides.of(outputs.scores)
        apart = rewards[:, 0] - rewards[:, 1]
        losses = -jax.nn.log_sigmoid(apart - sides.of(batch.margins)[:, 0])
        if self.centering:
            losses += self.centering * rewards.sum(1) ** 2

        real = sides.real.astype(jnp.float32)
        answers = sides.real[:, None]
        metrics = {
            "accuracy": Mean(((apart > 0) * real).sum(), real.sum()),
            "margin": Mean((apart * real).sum(), real.sum()),
            "mean_reward": Mean((rewards.sum(1) * real).sum(), 2 * real.sum()),
            "reward": Extremes(
                jnp.where(answers, rewards, jnp.inf).min(),
                jnp.where(answers, rewards, -jnp.inf).max(),
            ),
        }
        source_ids = jnp.where(sides.real, sides.of(batch.source_ids)[:, 0], -1)
        return Terms(losses, real, source_ids, metrics)
