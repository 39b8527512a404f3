"""Held-out pairs of a reward model: every answer's score, and what the scores are worth.

Whether the chosen answer gets the higher one is half of it. A reward that is optimised against must
also be right about how sure it is, and must not stand for the answer's length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from posttrain import metrics as reporting
from posttrain import sharding
from posttrain.data.cache import Cache
from posttrain.data.plan import BatchConfig, Plan
from posttrain.metrics import Metrics
from posttrain.train.model import Model
from posttrain.train.offline import OfflineSource
from posttrain.train.step import Forward
from posttrain.types import Batch, Extremes, Mean

BINS = 10
"""Of the confidences from 0.5 to 1, for the calibration error."""
ROUND = 128
"""Rows of examples to be scored are this many tokens long, or a multiple: few shapes."""


def score_step_fn(forward: Forward) -> Callable[..., tuple[Metrics, jax.Array]]:
    """Jitted (params, batch) -> (metrics, scores [A, B, S]), both whole on every device."""

    def step(params: Any, batch: Batch) -> tuple[Metrics, jax.Array]:
        def one(micro: Batch) -> tuple[Metrics, jax.Array]:
            outputs = forward.outputs(params, micro)
            terms = forward.loss(outputs, micro)
            loss = Mean((terms.values * terms.weights).sum(), terms.weights.sum())
            return terms.metrics | {"loss": loss}, outputs.scores

        metrics, scores = jax.lax.map(one, batch)
        return {name: _over_micro_batches(value) for name, value in metrics.items()}, scores

    return jax.jit(step, out_shardings=sharding.replicated(forward.mesh))


def _over_micro_batches(value: Mean | Extremes) -> Mean | Extremes:
    if isinstance(value, Extremes):
        return Extremes(value.low.min(), value.high.max())
    return Mean(value.total.sum(), value.count.sum())


def gather_scores(
    examples: Any,
    plan: Plan,
    mesh: jax.sharding.Mesh,
    run: Callable[[Batch], jax.Array],
    done: Callable[[int], None] = lambda step: None,
) -> Float[np.ndarray, " N"]:
    """float32: the score of each example of the plan's one epoch, NaN of those not in it.

    run: a batch's scores [A, B, S]. The host asks for a batch's scores once the next is on its way.
    done: told each step whose scores are here.
    """
    found = np.full(len(plan.index.lengths), np.nan, np.float32)
    source = OfflineSource(examples, plan, mesh)
    waiting: list[tuple[int, jax.Array]] = []

    def fetch() -> None:
        step, scores = waiting.pop(0)
        layout = plan.layout(step)
        there = layout >= 0
        found[layout[there]] = jax.device_get(scores)[there]
        done(step)

    try:
        for step in range(plan.steps):
            waiting.append((step, run(source.next())))
            if len(waiting) > 1:
                fetch()
        fetch()
    finally:
        source.close()
    return found


@dataclass(frozen=True)
class _EachAlone:
    """A cache's examples, of pairs too, as a plan takes what need not lie in one batch."""

    lengths: np.ndarray
    trained: np.ndarray
    source_ids: np.ndarray
    source_names: list[str]
    sides: int = 1


def score_examples(
    cache: Cache,
    model: Model,
    mesh: jax.sharding.Mesh,
    *,
    rows: int,
    done: Callable[[Int[np.ndarray, " n"]], None],
) -> Float[np.ndarray, " N"]:
    """float32: the score of every example by a reward model, packed, `rows` rows of a device at a
    time. done: told the ids of each batch's examples once their scores are here."""
    longest = -(-int(cache.lengths.max()) // ROUND) * ROUND
    shards = sharding.batch_shards(mesh)
    index = _EachAlone(cache.lengths, cache.trained, cache.source_ids, cache.source_names)
    size = BatchConfig(rows=rows * shards, order="sequential")
    plan = Plan(index, size, seq_len=longest, seed=0, epochs=1, batch_shards=shards)

    def score(params: Any, batch: Batch) -> jax.Array:
        network = nnx.merge(model.graphdef, params)
        micro = jax.tree.map(lambda x: x[0], batch)
        hidden = network.hidden(micro.tokens, micro.positions, micro.segment_ids)
        return network.scores(hidden, micro.segment_ids, micro.example_ids.shape[-1])[None]

    run = jax.jit(score, out_shardings=sharding.replicated(mesh))

    def tell(step: int) -> None:
        done(plan.examples(step))

    return gather_scores(cache, plan, mesh, lambda batch: run(model.params, batch), tell)


@dataclass(frozen=True)
class HeldOutPairs:
    """One set: its examples, its one-epoch plan in order, and the compiled scoring."""

    name: str
    cache: Any
    plan: Plan
    step: Callable[..., tuple[Metrics, jax.Array]]

    def measure(self, params: Any, mesh: jax.sharding.Mesh, live: None = None) -> dict[str, float]:
        """Of the whole set: eval/<name>/{loss, accuracy, margin, ...}, and what `judge` says."""
        total: Metrics = {}

        def run(batch: Batch) -> jax.Array:
            metrics, scores = self.step(params, batch)
            total.update({k: total[k] + v if k in total else v for k, v in metrics.items()})
            return scores

        scores = gather_scores(self.cache, self.plan, mesh, run)
        found = reporting.flatten(jax.device_get(total), [])
        found |= judge(scores, self.cache.trained)
        return {f"eval/{self.name}/{name}": value for name, value in found.items()}


def judge(scores: Float[np.ndarray, " N"], lengths: Int[np.ndarray, " N"]) -> dict[str, float]:
    """What scores of pairs are worth: examples 2p and 2p + 1 are pair p's chosen and rejected side.

    p = sigmoid(r(chosen) - r(rejected)) is the model's probability that the chosen one is preferred
    (no margin taken off), max(p, 1 - p) its confidence.
      ece                 expected calibration error: over BINS equal bins of the confidence, the
                          mean distance of a bin's accuracy from its mean confidence, weighted by
                          the bin's pairs (Guo et al. 2017, arXiv:1706.04599, eq. 3)
      brier               mean of (1 - p)^2 (Brier 1950); 0.25 for a model that knows nothing
      length_correlation  Pearson's, of scores and `lengths` (tokens of the answer) over all answers
                          (Singhal et al. 2023, arXiv:2310.03716)
      prefers_longer      share of the pairs of unequal lengths whose longer answer scores higher
      chosen_longer       share of them whose longer answer is the chosen one: what is to be learned
    What has no value (no spread, no unequal lengths) is left out.
    """
    scores, lengths = scores.astype(np.float64), lengths.astype(np.float64)
    apart = scores[0::2] - scores[1::2]
    longer = np.sign(lengths[0::2] - lengths[1::2])
    miss = 1 / (1 + np.exp(np.clip(apart, -700, 700)))  # 1 - p
    confidence = np.maximum(miss, 1 - miss)
    # a tie is no preference: half right
    right = (np.sign(apart) + 1) / 2
    at = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = np.bincount(at, right - confidence, BINS)
    found = {"ece": float(np.abs(gaps).sum() / len(apart)), "brier": float((miss**2).mean())}
    if scores.std() > 0 and lengths.std() > 0:
        found["length_correlation"] = float(np.corrcoef(scores, lengths)[0, 1])
    if (unequal := longer != 0).any():
        agrees = np.sign(apart)[unequal] * longer[unequal]
        found["prefers_longer"] = float(((agrees + 1) / 2).mean())
        found["chosen_longer"] = float((longer[unequal] > 0).mean())
    return found
