"""What several answers to one prompt say of a model: pass@k, majority vote, best of n."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence

import numpy as np

from posttrain.rewards.answers import final_number, last_boxed, number

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def pass_at(k: int, n: int, right: int) -> float:
    """The chance that of k answers, drawn without putting back from n, at least one is right.

        1 - C(n - right, k) / C(n, k)

    Unbiased for k fresh answers. Source: Chen et al. 2021 (arXiv:2107.03374), section 2.1. Raises
    ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} answers: k must be from 1 to {n}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def best_of(rewards: Sequence[float], right: Sequence[bool]) -> float:
    """Is the answer with the highest reward right? Where several share it, the share that is.

    An answer without a reward (NaN) is the best of none; 0 where all are.
    """
    known = [(reward, hit) for reward, hit in zip(rewards, right, strict=True) if reward == reward]
    highest = max((reward for reward, _ in known), default=math.nan)
    hits = [hit for reward, hit in known if reward == highest]
    return sum(hits) / len(hits) if hits else 0.0


def majority(votes: Sequence[Hashable], right: Sequence[bool]) -> float:
    """Is the answer that most say right? Where several have as many votes, the mean of them, which
    is what drawing one of them would give on average.

    Source: self-consistency (Wang et al. 2023, arXiv:2203.11171). Of equal votes some may be called
    right and others not (a format counts): their share is what the vote is worth.
    """
    by_vote: dict[Hashable, list[bool]] = {}
    for vote, hit in zip(votes, right, strict=True):
        by_vote.setdefault(vote, []).append(hit)
    most = max(map(len, by_vote.values()), default=0)
    winners = [sum(hits) / len(hits) for hits in by_vote.values() if len(hits) == most]
    return sum(winners) / len(winners) if winners else 0.0


def final_answer(text: str) -> str:
    r"""What an answer comes down to, to count votes by: what its last \boxed{} holds, or its last
    <answer> tags, else its final number, else all of it."""
    tagged = _TAGGED.findall(text)
    said = last_boxed(text) or (tagged[-1] if tagged else None)
    found = final_number(text) if said is None else number(said)
    if found is not None and (said is None or _is_number(said)):
        return str(found)
    return " ".join((said or text).split())


def _is_number(text: str) -> bool:
    """Is there nothing in it but a number, and what is written around one?"""
    return re.fullmatch(r"[\s$\\!,.\d/+-]+", text) is not None


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, s / sqrt(n); the error of fewer than two values is NaN.

    Answers to one prompt are not independent: the values are to be means of prompts.
    """
    array = np.asarray(values, np.float64)
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return float(array.mean()) if len(array) else math.nan, float(error)
