"""Rollouts as the tests of rewards need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.chat.parse import parse_assistant
from posttrain.types import Message, Prompt, Rollout


def rollout(
    text: str = "",
    answer: Any = None,
    *,
    length: int | None = None,
    group: int = 0,
    source: str = "",
    id: str = "task/0",
    messages: Sequence[Message] | None = None,
    question: str = "What?",
    rewards: Mapping[str, float | None] | None = None,
) -> Rollout:
    """An answer of `length` sampled tokens (as many as it has words) after a prompt of two."""
    sampled = len(text.split()) if length is None else length
    weights = np.r_[np.zeros(2), np.ones(sampled)].astype(np.float32)
    words = {word: k for k, word in enumerate(dict.fromkeys(text.split()))}
    ids = [words[word] for word in text.split()] if length is None else list(range(sampled))
    return Rollout(
        prompt=Prompt(id, ({"role": "user", "content": question},), answer, source=source),
        messages=tuple(messages) if messages is not None else (parse_assistant(text),),
        text=text,
        finish="stop",
        tokens=np.r_[[7, 8], ids].astype(np.int32),
        loss_weights=weights,
        logps=np.zeros(sampled + 2, np.float32),
        plain_logps=np.zeros(sampled + 2, np.float32),
        group=group,
        rewards=rewards or {},
    )
