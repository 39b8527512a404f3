"""Every preference loss in float32 where its inputs are extreme: ten thousand nats, certainty,
answers of one token and of none. Values, slopes and what is reported are numbers."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.losses import PAIR_LOSSES, UNPAIRED_LOSSES
from posttrain.losses.base import PreferenceLoss
from posttrain.losses.dpo import DPO
from posttrain.losses.mixture import Mixture
from posttrain.types import TWIN, Batch, TokenOutputs

SUMS = (-1e4, -300.0, -1.0, 0.0)  # of an answer, in nats
LENGTHS = ((1, 1), (2, 1), (0, 1), (1, 0))
PAIRS = [
    (said, lengths)
    for k, said in enumerate(itertools.product(SUMS, repeat=4))
    for lengths in (LENGTHS if k % 3 == 0 else LENGTHS[:1])
]
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
CASES: list[PreferenceLoss] = [made() for made in (PAIR_LOSSES | UNPAIRED_LOSSES).values()]
CASES += [
    PAIR_LOSSES[name].model_validate({"f_divergence": f})
    for name in ("dpo", "ipo", "sigmoid_norm", "discopop")
    for f in DIVERGENCES
]
CASES += [DPO(ld_alpha=0.5, use_weighting=True, nll_weight=1.0, label_smoothing=0.1)]
PARTS = [{"loss": {"type": "dpo"}}, {"loss": {"type": "bco_pair"}, "weight": 0.5}]
CASES += [Mixture.model_validate({"parts": PARTS})]


def made(loss: PreferenceLoss) -> tuple[Batch, TokenOutputs]:
    """A row is a pair: a token of context and up to two of answer, twice. Of labelled data the
    chosen side is a row, and the other one its mismatched twin."""
    n, width = len(PAIRS), 6
    segments, weights = np.zeros((n, width), np.int32), np.zeros((n, width), np.float32)
    policy, reference = np.zeros((n, width), np.float32), np.zeros((n, width), np.float32)
    for p, (said, lengths) in enumerate(PAIRS):
        for side, start in ((0, 0), (1, 3)):
            segments[p, start : start + 3] = side + 1
            answer = slice(start + 1, start + 1 + lengths[side])
            weights[p, answer] = 1
            policy[p, answer], reference[p, answer] = said[side], said[2 + side]
    ids = np.arange(2 * n).reshape(n, 2)
    labels = np.where(ids % 2 == 1, TWIN if loss.data == "twinned" else -1, ids // 2 % 2)
    batch = Batch(
        tokens=0 * segments, positions=0 * segments, segment_ids=segments, loss_weights=weights,
        example_ids=ids, source_ids=0 * ids, pair_ids=ids // 2, chosen=ids % 2 == 0,
        reference_logps=reference, labels=labels.astype(np.int8),
    )  # fmt: skip
    log_sum_sq = np.maximum(2 * policy, -7)  # of 1,000 tokens it is not below -log 1,000
    outputs = TokenOutputs(policy, weights, weights, log_sum_sq)
    return jax.tree.map(jnp.asarray, (batch, outputs))


@pytest.mark.parametrize("loss", CASES, ids=lambda loss: f"{type(loss).__name__} {loss.coupled}")
def test_extreme_inputs_give_numbers(loss: Any) -> None:
    batch, outputs = made(loss)

    @jax.jit
    def values(logps: jax.Array) -> Any:
        given = dataclasses.replace(outputs, logps=logps)
        coupled = (loss.statistic(given, batch),) if loss.coupled == "step" else ()
        terms = loss(given, batch, *jax.lax.stop_gradient(coupled))
        return (terms.values * terms.weights).sum(), terms

    (total, terms), grad = jax.value_and_grad(values, has_aux=True)(outputs.logps)
    assert terms.weights.sum() == len(PAIRS)
    assert np.isfinite(total)
    assert np.isfinite(terms.values).all()
    assert np.isfinite(grad).all()
    assert not np.asarray(grad)[np.asarray(batch.loss_weights) == 0].any()
    for name, mean in terms.metrics.items():
        assert np.isfinite(mean.total), name
