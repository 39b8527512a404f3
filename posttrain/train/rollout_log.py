"""Answers written down for people: <run_dir>/rollouts/<step>.jsonl, a line per answer.

The step is the one that metrics.jsonl reports the round with. report/rollouts.py reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.types import Rollout


def write_rollouts(
    path: Path,
    rollouts: Sequence[Rollout],
    advantages: Sequence[np.ndarray] | None = None,
    *,
    decode: Callable[[list[int]], str] | None = None,
) -> None:
    """The file appears whole or not at all. decode: with what is known of each token, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    # a lone surrogate, which a model may write, is no UTF-8: written as JSON names it
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for i, rollout in enumerate(rollouts):
            line = _line(rollout, None if advantages is None else advantages[i], decode)
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    temporary.replace(path)


def _line(
    rollout: Rollout, advantage: np.ndarray | None, decode: Callable[[list[int]], str] | None
) -> dict[str, Any]:
    sampled = rollout.loss_weights > 0
    line: dict[str, Any] = {
        "prompt_id": rollout.prompt.id,
        "group": rollout.group,
        "version": rollout.version,
        "prompt": list(rollout.prompt.messages),
        "answer": list(rollout.messages),
        "text": rollout.text,
        "expected": rollout.prompt.answer,
        "finish": rollout.finish,
        "length": rollout.length,
        "reward": None if math.isnan(rollout.reward) else rollout.reward,
        "rewards": dict(rollout.rewards),
    }
    if rollout.calls:
        line |= {"calls": rollout.calls, "failed_calls": rollout.failed_calls}
    if advantage is not None and sampled.any():
        line["advantage"] = float(advantage[sampled].mean())
    if decode is not None:
        line["tokens"] = rollout.tokens.tolist()
        line["pieces"] = [decode([token]) for token in rollout.tokens.tolist()]
        line["sampled"] = sampled.astype(int).tolist()
        line["logps"] = _rounded(rollout.logps)
        line["plain_logps"] = _rounded(rollout.plain_logps)
        if advantage is not None:
            line["advantages"] = _rounded(advantage)
    return line


def _rounded(values: np.ndarray) -> list[float]:
    """Seven digits: what float32 holds."""
    return [float(f"{value:.7g}") for value in values.tolist()]
