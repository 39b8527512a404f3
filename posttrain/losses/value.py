"""What a critic minimises."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from posttrain.config import Config, semantic
from posttrain.losses.nll import source_of_tokens
from posttrain.types import Batch, Mean, Terms, TokenOutputs


class SquaredError(Config):
    """Half the squared distance from the return, the mean over trained tokens.

        max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2

    V_old is what the critic said before the first update on the batch, c the clip: nothing is
    gained by moving further from it at once.
    Source: Schulman et al. 2016 (arXiv:1506.02438), section 5; clipped as in OpenAI's baselines
    (`ppo2`) and Ziegler et al. 2019 (arXiv:1909.08593).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    clip: float | None = semantic(0.2, gt=0, help="c; none = no clipping")

    def __call__(self, outputs: TokenOutputs, batch: Batch) -> Terms:
        """A term per token, [B, T]; returns and (with a clip) old_values of the batch.

        Metrics, over trained tokens: loss/value_avg (TRL's PPO), this loss; val/clipfrac_avg
        (likewise), share of them where the clipped square is the greater; values/mean and
        returns/mean; values/error, mean of (V - R)^2.
        """
        trained = (batch.loss_weights > 0).astype(jnp.float32)
        values: Float[Array, "B T"] = outputs.values
        squares = cut = (values - batch.returns) ** 2
        if self.clip is not None:
            near = batch.old_values + (values - batch.old_values).clip(-self.clip, self.clip)
            cut = (near - batch.returns) ** 2
        terms = jnp.maximum(squares, cut) / 2
        of_tokens = {
            "loss/value_avg": terms,
            "val/clipfrac_avg": (cut > squares).astype(jnp.float32),
            "values/mean": values,
            "values/error": squares,
            "returns/mean": batch.returns,
        }
        metrics = {k: Mean((x * trained).sum(), trained.sum()) for k, x in of_tokens.items()}
        return Terms(terms, trained, source_of_tokens(batch), metrics)
