"""Supervised fine-tuning: the weighted negative log-likelihood of the trained tokens.

    loss = sum_t w_t * (-log p(x_t | x_<t)) / sum_t w_t

over all tokens of the optimiser step at once: every trained token counts the same, whatever row,
micro-batch, device or host it lies on. w is 0 on context and padding.
"""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from posttrain.config import Config
from posttrain.types import Batch, Mean, Terms, TokenOutputs


class NLL(Config):
    """Weighted mean negative log-likelihood, in nats per trained token."""

    needs: ClassVar[frozenset[str]] = frozenset({"logps", "entropy", "correct"})

    def __call__(self, outputs: TokenOutputs, batch: Batch) -> Terms:
        """A term per token, [B, T].

        Metrics, over trained tokens (weight > 0), each counted once whatever its weight: entropy
        (nats) and mean_token_accuracy (share of targets that were the most probable token).
        """
        weights: Float[Array, "B T"] = batch.loss_weights
        trained = (weights > 0).astype(jnp.float32)
        metrics = {
            "entropy": Mean((outputs.entropy * trained).sum(), trained.sum()),
            "mean_token_accuracy": Mean((outputs.correct * trained).sum(), trained.sum()),
        }
        return Terms(-outputs.logps, weights, source_of_tokens(batch), metrics)


def source_of_tokens(batch: Batch) -> Int[Array, "B T"]:
    """The source of each token, -1 on padding."""
    segment_BT = jnp.maximum(batch.segment_ids - 1, 0)
    source_BT = jnp.take_along_axis(batch.source_ids, segment_BT, axis=1)
    return jnp.where(batch.segment_ids > 0, source_BT, -1)
