"""Reward models among the parts of a reward: loaded by the job, asked by its scorer.

A model lies on the devices of this process alone, beside the policy: rewards are asked for by one
process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from posttrain import sharding
from posttrain.chat.render import ChatError
from posttrain.config import ConfigError
from posttrain.rewards.base import Reward, ScoreFunction
from posttrain.rewards.reward_model import RewardModel
from posttrain.train.model import open_model
from posttrain.train.rewards import ROUND
from posttrain.types import Conversation, Rollout


def score_functions(parts: Mapping[str, Reward]) -> dict[str, ScoreFunction]:
    """What the Scorer asks for each part that is a reward model; loads them. ConfigError."""
    return {
        name: AnswerScores(name, part)
        for name, part in parts.items()
        if isinstance(part, RewardModel)
    }


class AnswerScores:
    """Scores of rollouts by one model: (rollouts) -> a float each, in their order."""

    def __init__(self, name: str, part: RewardModel):
        self._part = part
        self._mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices())
        with jax.set_mesh(self._mesh):
            # one score a row: of what the template makes of the last turn
            chat = part.chat.model_copy(update={"train_on": "last"})
            self._model = open_model(
                part.model_copy(update={"chat": chat}), self._mesh, head="score"
            )
        room = self._model.spec.max_positions
        if part.seq_len is not None and part.seq_len > room:
            raise ConfigError(
                f"rewards.{name}.seq_len is {part.seq_len}, and the model's context is {room}"
            )
        self._longest = part.seq_len or room

        def score(params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
            network = nnx.merge(self._model.graphdef, params)
            columns = jax.numpy.arange(tokens.shape[1])
            segments = (columns < lengths[:, None]).astype(np.int32)
            positions = jax.numpy.broadcast_to(columns, tokens.shape) * segments
            hidden = network.hidden(tokens, positions, segments)
            return network.scores(hidden, segments, 1)[:, 0]

        self._score = jax.jit(score, out_shardings=sharding.replicated(self._mesh))

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """ValueError: a conversation does not fit, or the template refuses it."""
        tokens = self._tokens(rollouts)
        order = sorted(range(len(tokens)), key=lambda k: len(tokens[k]))
        size = self._part.rows * sharding.batch_shards(self._mesh)
        waiting: list[tuple[list[int], jax.Array]] = []
        with jax.set_mesh(self._mesh):
            for at in range(0, len(order), size):
                some = order[at : at + size]
                waiting.append((some, self._begin([tokens[k] for k in some], size)))
        found = np.full(len(tokens), np.nan)
        for some, scores in waiting:
            found[some] = jax.device_get(scores)[: len(some)]
        return found.tolist()

    def _begin(self, rows: list[np.ndarray], size: int) -> jax.Array:
        """Scores [size]; rows are padded to a power of two times ROUND: few shapes."""
        wide = ROUND
        while wide < max(map(len, rows)):
            wide *= 2
        lengths = np.array([len(row) for row in rows] + [0] * (size - len(rows)), np.int32)
        block = np.zeros((size, wide), np.int32)
        for line, row in zip(block, rows, strict=False):
            line[: len(row)] = row
        sharded = sharding.named_sharding(self._mesh, ("batch",))
        inputs = jax.device_put((block, lengths), sharded)
        return self._score(self._model.params, *inputs)

    def _tokens(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        conversations = [
            Conversation(
                (*rollout.prompt.messages, *rollout.messages),
                rollout.prompt.tools,
                rollout.prompt.template_kwargs,
            )
            for rollout in rollouts
        ]
        found = []
        done = self._model.chat.examples_batch(conversations)
        for rollout, examples in zip(rollouts, done, strict=True):
            if isinstance(examples, ChatError):
                raise ValueError(f"prompt {rollout.prompt.id}: {examples}") from examples
            tokens = examples[-1].tokens
            if len(tokens) > self._longest and self._part.too_long == "error":
                raise ValueError(
                    f"prompt {rollout.prompt.id}: {len(tokens)} tokens of the reward model, more "
                    f"than {self._longest}: too_long: truncate_start cuts off the start"
                )
            found.append(tokens[-self._longest :])
        return found
