"""Prompts answered by the policy and judged: rewards are asked for while others are being sampled.

On several processes sampling is one program of all of them; rewards are asked for by process 0
alone, and what they are is sent to the others as bytes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.chat.template import ChatTemplate
from posttrain.rewards.scorer import Scorer, Scoring
from posttrain.sampling.conversation import make_rollouts
from posttrain.sampling.request import RolloutEngine, Sampling
from posttrain.tools import Tool
from posttrain.train.answers import shared
from posttrain.train.source import Stopped
from posttrain.types import Prompt, Rollout


@dataclass(frozen=True)
class Answered:
    """Scored rollouts, n of each prompt side by side; seconds of sampling, and of waiting for
    rewards after that."""

    rollouts: list[Rollout]
    sampling: float
    rewards: float

    @property
    def tokens(self) -> int:
        """How many were sampled."""
        return sum(rollout.length for rollout in self.rollouts)


class Answering:
    """An engine, and all that stands between it and scored rollouts. scorer: of process 0."""

    def __init__(
        self,
        engine: RolloutEngine,
        chat: ChatTemplate,
        scorer: Scorer | None,
        *,
        seq_len: int,
        tools: Mapping[str, Tool],
        max_turns: int,
    ):
        self._engine, self._chat, self._scorer = engine, chat, scorer
        self._seq_len, self._tools, self._max_turns = seq_len, tools, max_turns
        self._version: int | None = None
        self._stopped: Callable[[], bool] = lambda: False

    def decode(self, tokens: list[int]) -> str:
        """Their text, as the policy's tokenizer has it."""
        return self._chat.tokenizer.decode(tokens)

    def watch(self, stopped: Callable[[], bool]) -> None:
        """stopped() is asked whenever an answer has ended, which all processes see in one order."""
        self._stopped = stopped

    def update(self, params: Any, version: int) -> None:
        """Answers come from these weights from now on: those after `version` updates."""
        if version != self._version:
            self._engine.update(params)
            self._version = version

    def __call__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        n: int,
        seed: int,
        first_group: int = 0,
    ) -> Answered:
        """n answers to each; draws depend on seed and prompt alone. Raises what a reward raised;
        Stopped where the run was told to stop meanwhile."""
        assert self._version is not None, "update() comes first"
        begun: dict[int, Scoring] = {}

        def judge(index: int, rollout: Rollout) -> None:
            if self._stopped():
                raise Stopped
            if self._scorer is not None:
                begun[index] = self._scorer.start(rollout)

        began = time.monotonic()
        rollouts = make_rollouts(
            prompts,
            self._engine,
            self._chat,
            sampling,
            n=n,
            seed=seed,
            tools=self._tools,
            max_turns=self._max_turns,
            context=self._seq_len,
            version=self._version,
            first_group=first_group,
            on_rollout=judge,
            share=shared,
        )
        sampled = time.monotonic()

        def verdicts() -> bytes:
            assert self._scorer is not None, "process 0 has one"
            scored = self._scorer.finish([begun[i] for i in range(len(rollouts))])
            return json.dumps([[s.rewards, s.reward] for s in scored]).encode()

        found = json.loads(shared(verdicts))
        scored = [
            dataclasses.replace(rollout, rewards=rewards, reward=reward)
            for rollout, (rewards, reward) in zip(rollouts, found, strict=True)
        ]
        return Answered(scored, sampled - began, time.monotonic() - sampled)
