"""Direct preference optimisation: the chosen answer more probable than the rejected one, measured
against what the reference model says of both.

    r(y) = beta * sum_t (log p(y_t | x, y_<t) - log p_ref(y_t | x, y_<t))
    loss = -(1 - e) log sigmoid(r(chosen) - r(rejected)) - e log sigmoid(r(rejected) - r(chosen))

Rafailov et al. 2023 (arXiv:2305.18290), eq. 7. e is the label smoothing of conservative DPO
(Mitchell, "A note on DPO with noisy preferences", 2023, eq. 3): the share of pairs that are taken
to be labelled the wrong way round. nll_weight adds the chosen answer's negative log-likelihood per
token (RPO; Pang et al. 2024, arXiv:2404.19733, eq. 1, whose alpha is 1 / nll_weight).
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from posttrain.config import Config, semantic
from posttrain.losses.pairs import find_sides, segment_sums
from posttrain.types import Batch, Mean, Terms, TokenOutputs


class DPO(Config):
    """Sigmoid DPO: the mean over pairs, in nats."""

    needs: ClassVar[frozenset[str]] = frozenset({"logps", "reference_logps", "entropy", "correct"})

    beta: float = semantic(0.1, gt=0, help="how strongly the policy is held to the reference")
    label_smoothing: float = semantic(
        0.0, ge=0, lt=0.5, help="share of pairs taken to be labelled the wrong way round (cDPO)"
    )
    nll_weight: float = semantic(
        0.0, ge=0, help="weight of the chosen answer's negative log-likelihood per token (RPO)"
    )

    def __call__(self, outputs: TokenOutputs, batch: Batch) -> Terms:
        """A term per pair, [P], each of weight 1. Every trained token (weight > 0) counts once.

        Metrics, under TRL's names: rewards/{chosen,rejected,margins,accuracies} and
        logps/{chosen,rejected}, means over pairs of r, their difference, whether it is positive,
        and the answers' log-probabilities; entropy over the trained tokens of both sides;
        mean_token_accuracy over those of the chosen side.
        """
        trained = (batch.loss_weights > 0).astype(jnp.float32)
        sides = find_sides(batch)
        # Token by token before the sum: the difference of two sums of hundreds of nats would keep
        # fewer digits than the sum of the differences.
        ratios = sides.of(segment_sums((outputs.logps - batch.reference_logps) * trained, batch))
        logps = sides.of(segment_sums(outputs.logps * trained, batch))
        tokens = sides.of(segment_sums(trained, batch))
        right = sides.of(segment_sums(outputs.correct * trained, batch))

        rewards: Float[Array, "P 2"] = self.beta * ratios
        margins = rewards[:, 0] - rewards[:, 1]
        losses = -(1 - self.label_smoothing) * jax.nn.log_sigmoid(margins)
        losses -= self.label_smoothing * jax.nn.log_sigmoid(-margins)
        if self.nll_weight:
            losses -= self.nll_weight * logps[:, 0] / jnp.maximum(tokens[:, 0], 1)

        real = sides.real.astype(jnp.float32)
        of_pairs = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).astype(jnp.float32),
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
        }
        metrics = {name: Mean((x * real).sum(), real.sum()) for name, x in of_pairs.items()}
        metrics["entropy"] = Mean((outputs.entropy * trained).sum(), trained.sum())
        metrics["mean_token_accuracy"] = Mean(
            (right[:, 0] * real).sum(), (tokens[:, 0] * real).sum()
        )
        source_ids = jnp.where(sides.real, sides.of(batch.source_ids)[:, 0], -1)
        return Terms(losses, real, source_ids, metrics)
