"""Every preference loss as its paper has it, in float64 and numpy, answer by answer.

Nothing of the package computes here but the settings it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.types import TWIN, Batch, TokenOutputs


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


@dataclass
class Answer:
    """One segment's trained tokens: log-probs by policy and reference, log sum p^2."""

    policy: np.ndarray
    reference: np.ndarray
    log_sum_sq: np.ndarray

    def __len__(self) -> int:
        return len(self.policy)


def answers_of(batch: Batch, outputs: TokenOutputs, logps: np.ndarray | None = None) -> dict:
    """(row, segment) -> Answer; logps in the place of outputs.logps where given."""
    logps = np.asarray(outputs.logps, np.float64) if logps is None else logps
    reference = np.asarray(batch.reference_logps, np.float64)
    squares = np.asarray(outputs.log_sum_sq, np.float64)
    segments, weights = np.asarray(batch.segment_ids), np.asarray(batch.loss_weights)
    found = {}
    for b, s in np.argwhere(np.asarray(batch.example_ids) >= 0).tolist():
        t = np.flatnonzero((segments[b] == s + 1) & (weights[b] > 0))
        found[b, s] = Answer(logps[b, t], reference[b, t], squares[b, t])
    return found


def pairs_of(batch: Batch, outputs: TokenOutputs, logps: np.ndarray | None = None) -> list:
    """(chosen, rejected) of each pair, by its number."""
    ids, chosen = np.asarray(batch.pair_ids), np.asarray(batch.chosen)
    found: list[dict[bool, Answer]] = [{} for _ in range(ids.max() + 1)]
    for (b, s), answer in answers_of(batch, outputs, logps).items():
        found[ids[b, s]][bool(chosen[b, s])] = answer
    return [(pair[True], pair[False]) for pair in found]


def log_ratio(loss: Any, answer: Answer, other: Answer, of: str = "ratio") -> float:
    """log p - log p_ref of an answer (of "policy": log p), LD-DPO's tail at its weight."""
    values = answer.policy - (answer.reference if of == "ratio" else 0)
    alpha = getattr(loss, "ld_alpha", None)
    if alpha is None:
        return values.sum()
    shared = min(len(answer), len(other))
    return values[:shared].sum() + alpha * values[shared:].sum()


def divergence(loss: Any, u: float) -> float:
    """f'(e^u) of the f-divergence (Wang et al. 2023, table 1), up to a constant."""
    name = getattr(loss, "f_divergence", "reverse_kl")
    if name == "forward_kl":
        return 1 - 1 / np.exp(u)
    if name == "js_divergence":
        return np.log(2 * np.exp(u) / (np.exp(u) + 1))
    if name == "alpha_divergence" and loss.f_alpha != 1:
        a = loss.f_alpha - 1
        return (np.exp(u) ** a - 1) / a
    return u


def pair_losses(name: str, loss: Any, batch: Batch, outputs: TokenOutputs, logps: Any = None):
    """float64 [P]: the loss of each pair."""
    pairs = pairs_of(batch, outputs, logps)
    still = pairs_of(batch, outputs)
    by_name = {"aot": aot, "aot_unpaired": aot}
    values = by_name.get(name, each)(name, loss, pairs)
    for p, (chosen, _) in enumerate(pairs):
        if getattr(loss, "use_weighting", False):  # WPO: the weights have no gradient
            for side in still[p]:
                values[p] *= np.exp((side.policy - side.log_sum_sq).mean())
        values[p] += loss.nll_weight * -chosen.policy.mean()
    return values


def each(name: str, loss: Any, pairs: list) -> np.ndarray:
    return np.array([one(name, loss, chosen, rejected) for chosen, rejected in pairs])


def one(name: str, loss: Any, chosen: Answer, rejected: Answer) -> float:
    b = loss.beta
    e = getattr(loss, "label_smoothing", 0.0)
    if name in ("simpo", "orpo", "cpo"):
        mean_c, mean_r = chosen.policy.mean(), rejected.policy.mean()
        if name == "simpo":
            m = b * mean_c - b * mean_r - loss.gamma
        elif name == "cpo":
            m = b * chosen.policy.sum() - b * rejected.policy.sum()
        else:
            odds = [np.exp(x) / (1 - np.exp(x)) for x in (mean_c, mean_r)]
            return -b * np.log(sigmoid(np.log(odds[0] / odds[1])))
        return -(1 - e) * np.log(sigmoid(m)) - e * np.log(sigmoid(-m))
    u, v = log_ratio(loss, chosen, rejected), log_ratio(loss, rejected, chosen)
    s, t = divergence(loss, u), divergence(loss, v)
    m = b * (s - t)
    if name == "dpo":
        return -(1 - e) * np.log(sigmoid(m)) - e * np.log(sigmoid(-m))
    if name == "robust":
        return (-(1 - e) * np.log(sigmoid(m)) + e * np.log(sigmoid(-m))) / (1 - 2 * e)
    if name == "sigmoid_norm":
        return -np.log(sigmoid(b * s / len(chosen) - b * t / len(rejected)))
    if name == "hinge":
        return max(0.0, 1 - m)
    if name == "ipo":
        return (s / len(chosen) - t / len(rejected) - 1 / (2 * b)) ** 2
    if name == "exo_pair":
        q = sigmoid(m)
        return q * np.log(q / (1 - e)) + (1 - q) * np.log((1 - q) / e)
    if name == "nca_pair":
        others = 0.5 * np.log(sigmoid(-b * u)) + 0.5 * np.log(sigmoid(-b * v))
        return -np.log(sigmoid(b * u)) - others
    if name == "bco_pair":
        return -np.log(sigmoid(b * u)) - np.log(sigmoid(-b * v))
    if name == "sppo_hard":
        return (u - 1 / (2 * b)) ** 2 + (v + 1 / (2 * b)) ** 2
    if name == "apo_zero":
        return 1 - sigmoid(b * u) + sigmoid(b * v)
    if name == "apo_down":
        return sigmoid(b * u) + 1 - sigmoid(b * (u - v))
    if name == "discopop":
        w = sigmoid(m / loss.tau)
        return (1 - w) * -np.log(sigmoid(m)) + w * np.exp(-m)
    raise AssertionError(f"no formula for {name}: write it here")


def aot(name: str, loss: Any, pairs: list) -> np.ndarray:
    """Sorted values against sorted values: the i-th term belongs to no pair."""
    ratio = np.array([[log_ratio(loss, a, b), log_ratio(loss, b, a)] for a, b in pairs])
    policy = np.array(
        [[log_ratio(loss, a, b, "policy"), log_ratio(loss, b, a, "policy")] for a, b in pairs]
    )
    reference = policy - ratio
    if name == "aot":
        up, down = policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]
    else:
        up, down = ratio[:, 0], ratio[:, 1]
    m, e = loss.beta * (np.sort(up) - np.sort(down)), loss.label_smoothing
    return -(1 - e) * np.log(sigmoid(m)) - e * np.log(sigmoid(-m))


def row_losses(
    name: str, loss: Any, batch: Batch, outputs: TokenOutputs, logps: Any = None
) -> tuple[np.ndarray, float]:
    """(float64 [rows], by row and segment; the shift) of losses on labelled answers."""
    labels = np.asarray(batch.labels)
    moved = answers_of(batch, outputs, logps)
    still = answers_of(batch, outputs)  # what is of all rows has no gradient
    rewards = {
        at: loss.beta * (a.policy - a.reference).sum() for at, a in still.items() if labels[at] >= 0
    }
    if name == "kto":
        twins = [(a.policy - a.reference).sum() for at, a in still.items() if labels[at] == TWIN]
        shift = loss.beta * max(0.0, float(np.mean(twins)))
    elif name == "bco":
        of = [[r for at, r in rewards.items() if labels[at] == label] for label in (1, 0)]
        shift = float(np.mean([np.mean(x) for x in of if x]))
    else:
        shift = 0.0
    values = []
    for at in sorted(rewards):
        r = loss.beta * (moved[at].policy - moved[at].reference).sum()
        good = labels[at] == 1
        x = r - shift if good else shift - r
        value = -np.log(sigmoid(x)) if name == "bco" else 1 - sigmoid(x)
        values.append((loss.desirable_weight if good else loss.undesirable_weight) * value)
    return np.array(values), shift
