"""Policy losses as their papers have them, in float64 and numpy, token by token.

Nothing of the package computes here but the settings it is asked for. What a paper takes no
gradient of (sg) is made of `at`, log-probabilities that stand still while `logps` are moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.types import Batch, TokenOutputs


@dataclass
class Answer:
    """One segment's trained tokens: where they lie, and what is known of each."""

    row: int
    at: np.ndarray
    old: np.ndarray
    sampled: np.ndarray
    reference: np.ndarray
    advantages: np.ndarray
    entropy: np.ndarray
    source: int

    def __len__(self) -> int:
        return len(self.at)

    def of(self, logps: np.ndarray) -> np.ndarray:
        return logps[self.row, self.at]


def answers_of(batch: Batch, outputs: TokenOutputs) -> list[Answer]:
    segments, weights = np.asarray(batch.segment_ids), np.asarray(batch.loss_weights)
    old, sampled, reference, advantages, entropy = (
        np.asarray(x, np.float64)
        for x in (batch.old_logps, batch.sampled_logps, batch.reference_logps, batch.advantages,
                  outputs.entropy)
    )  # fmt: skip
    found = []
    for b, s in np.argwhere(np.asarray(batch.example_ids) >= 0).tolist():
        t = np.flatnonzero((segments[b] == s + 1) & (weights[b] > 0))
        if len(t):
            source = int(np.asarray(batch.source_ids)[b, s])
            found.append(
                Answer(b, t, old[b, t], sampled[b, t], reference[b, t], advantages[b, t],
                       entropy[b, t], source)
            )  # fmt: skip
    return found


def ratios(loss: Any, answer: Answer, logps: np.ndarray) -> np.ndarray:
    """r of each token."""
    log = logps - answer.old
    if loss.ratio == "sequence":  # GSPO, eq. 7: the geometric mean
        log = np.full(len(log), sum(log) / len(log))
    elif loss.ratio == "product":
        log = np.full(len(log), sum(log))
    return np.exp(log)


def policy_term(loss: Any, answer: Answer, logps: np.ndarray, at: np.ndarray) -> np.ndarray:
    name = type(loss).__name__
    if name == "Reinforce":
        return -answer.advantages * logps
    if name == "CISPO":  # sg of the weight
        weight = [min(max(r, loss.low), loss.high) for r in ratios(loss, answer, at)]
        return -np.array(weight) * answer.advantages * logps
    out = []
    for r, a in zip(ratios(loss, answer, logps), answer.advantages, strict=True):
        gain = min(r * a, min(max(r, 1 - loss.low), 1 + loss.high) * a)
        if loss.dual is not None and a < 0:
            gain = max(gain, loss.dual * a)
        out.append(-gain)
    return np.array(out)


def weights_of(correction: Any, answer: Answer) -> np.ndarray:
    """TIS and MIS: w = p_old / q, cut off."""
    if correction.type == "none":
        return np.ones(len(answer))
    log = answer.old - answer.sampled
    w = np.exp(np.full(len(log), log.sum()) if correction.level == "sequence" else log)
    low = correction.low or 0
    high = np.inf if correction.high is None else correction.high
    if correction.type == "truncate":
        return np.minimum(np.maximum(w, low), high)
    return np.array([x if low <= x <= high else 0.0 for x in w])


def kl_value(estimator: str, d: np.ndarray) -> np.ndarray:
    return {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[estimator]


def kl_term(kl: Any, answer: Answer, logps: np.ndarray, at: np.ndarray) -> np.ndarray:
    if not kl.unbiased:
        return kl_value(kl.estimator, logps - answer.reference)
    moved, still = np.exp(at - answer.old), at - answer.reference
    return moved * (kl_value(kl.estimator, still) + still * (logps - at))


def loss_of(
    loss: Any,
    kl: Any,
    answers: list[Answer],
    logps: np.ndarray,
    at: np.ndarray | None = None,
    source: int | None = None,
) -> float:
    """The loss of these answers; of a source, its own mean."""
    at = logps if at is None else at
    totals, lengths = [], []
    for answer in answers:
        if source not in (None, answer.source):
            continue
        now, still = answer.of(logps), answer.of(at)
        tokens = weights_of(loss.correction, answer) * policy_term(loss, answer, now, still)
        tokens = tokens - loss.entropy_coef * answer.entropy
        if kl.coef and kl.place == "loss" and (kl.idle or answer.advantages.any()):
            tokens = tokens + kl.coef * kl_term(kl, answer, now, still)
        totals.append(sum(tokens))
        lengths.append(len(answer))
    if loss.aggregate == "token":
        return sum(totals) / sum(lengths)
    if loss.aggregate == "sequence":
        return sum(x / n for x, n in zip(totals, lengths, strict=True)) / len(totals)
    return sum(totals) / (len(totals) * loss.length)


def slope(function: Callable[[np.ndarray], float], x: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The derivative by each of the entries that are named, by central differences."""
    out, step = np.zeros_like(x), 1e-6
    for index in zip(*np.nonzero(where), strict=True):
        moved = np.zeros_like(x)
        moved[index] = step
        out[index] = (function(x + moved) - function(x - moved)) / (2 * step)
    return out
