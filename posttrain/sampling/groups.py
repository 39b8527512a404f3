"""The scored answers to many prompts, prompt by prompt, each as soon as it and those before it are
whole: what rejection sampling and evaluation are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from posttrain.chat.template import ChatError, ChatTemplate
from posttrain.config import ConfigError
from posttrain.rewards.base import HandedReward, ManyReward
from posttrain.rewards.scorer import Scorer, Scoring
from posttrain.sampling.conversation import Share, admit, make_rollouts
from posttrain.sampling.request import RolloutEngine, Sampling
from posttrain.tools import Tool
from posttrain.types import Prompt, Rollout

T = TypeVar("T")
_SHOWN = 20  # prompts without room that a message repeats


def refuse(
    prompts: Sequence[Prompt],
    chat: ChatTemplate,
    sampling: Sampling,
    tools: Mapping[str, Tool],
    context: int | None,
    *,
    max_turns: int = 8,
    split: str = "",
) -> int:
    """Tokens of the shortest of the prompts (of none: 0).

    ConfigError before anything is sampled: prompts that leave no room for an answer in `context`
    tokens, or that the template does not take, with answers of the tools behind them. split: of
    the task's prompts, for the message.
    """
    wrong, lengths = [], [0] * (not prompts)
    steady: set[str] = set()
    for prompt in prompts:
        try:
            _, _, ids = admit(prompt, chat, tools, max_turns, steady)
        except ValueError as error:
            reason = error.reason if isinstance(error, ChatError) else str(error)
            wrong.append(f"{prompt.id}: {reason}")
            continue
        lengths.append(len(ids))
        if context is not None and len(ids) + sampling.max_new_tokens > context:
            wrong.append(f"{prompt.id}: {len(ids)} tokens")
    if wrong:
        more = [f"... and {len(wrong) - _SHOWN:,} more"] if len(wrong) > _SHOWN else []
        split += " " * bool(split)
        room = f" in {context} tokens (seq_len, or the model's context)" if context else ""
        longest = f" (the longest has {max(lengths)})" if lengths else ""
        raise ConfigError(
            f"task: {len(wrong):,} of {len(prompts):,} {split}prompts cannot be asked, or leave "
            f"no room for sampling.max_new_tokens={sampling.max_new_tokens}{room}{longest}:\n    "
            + "\n    ".join([*wrong[:_SHOWN], *more])
        )
    return min(lengths)


def answer_all(
    prompts: Sequence[Prompt],
    engine: RolloutEngine,
    chat: ChatTemplate,
    sampling: Sampling,
    scorer: Scorer | None,
    on_group: Callable[[int, list[Rollout]], None],
    *,
    n: int,
    seed: int,
    first: int = 0,
    at_once: int = 128,
    tools: Mapping[str, Tool] | None = None,
    max_turns: int = 8,
    context: int | None = None,
    share: Share | None = None,
) -> None:
    """Calls on_group(i, the n scored answers to prompts[i]) for i = first, first + 1, ...

    at_once: prompts that are handed to the engine together. Each prompt's answers and rewards are
    the same whatever it is, and wherever one begins: the scorer is asked about one prompt at a
    time, and rewards that judge many answers at once about as many as are handed over together.
    scorer None: nothing is judged or told, as on the processes beside the one that judges. share:
    as make_rollouts takes it.
    """
    for begin in range(first, len(prompts), at_once):
        chunk = [prompts[i] for i in range(begin, min(begin + at_once, len(prompts)))]
        alone = share is None
        under_way = _Chunk(scorer, begin, len(chunk), n, on_group, alone) if scorer else None
        make_rollouts(
            chunk,
            engine,
            chat,
            sampling,
            n=n,
            seed=seed,
            tools=tools,
            max_turns=max_turns,
            context=context,
            on_rollout=under_way.judge if under_way else None,
            share=share,
        )
        _finish(under_way, share)


def _finish(under_way: _Chunk | None, share: Share | None) -> None:
    """An error of process 0 ends the others, too: they would wait for it in the next program."""

    def made() -> bytes:
        assert under_way is not None, "process 0 judges"
        under_way.finish()
        return b""

    if share is not None:
        share(made)
    elif under_way is not None:
        under_way.finish()


@dataclass
class _Chunk:
    """Prompts that were handed over together, and the rewards that are asked for meanwhile.

    alone: no other process samples along; else what fails is raised when all answers have ended.
    """

    scorer: Scorer
    first: int
    count: int
    n: int
    on_group: Callable[[int, list[Rollout]], None]
    alone: bool = True
    failed: Exception | None = None
    begun: dict[int, Scoring] = field(default_factory=dict)
    told: int = 0

    @property
    def together(self) -> bool:
        """Is there a reward that is better asked about many answers at once?"""
        kinds = (ManyReward, HandedReward)
        return any(isinstance(part, kinds) for part in self.scorer.parts.values())

    def judge(self, index: int, rollout: Rollout) -> None:
        """An answer has ended; those before it may be whole and judged by now."""
        if self.failed is not None:
            return
        try:
            self._judge(index, rollout)
        except Exception as error:
            if self.alone:
                raise
            self.failed = error

    def _judge(self, index: int, rollout: Rollout) -> None:
        self.begun[index] = self.scorer.start(rollout)
        while not self.together and self.told < self.count:
            group = [self.begun.get(i) for i in self._members(self.told)]
            scorings = [scoring for scoring in group if scoring and scoring.values.done()]
            if len(scorings) < self.n:
                return
            self._tell(scorings)

    def finish(self) -> None:
        """All answers have ended: waits for what is left."""
        if self.failed is not None:
            raise self.failed
        left = [self.begun[i] for k in range(self.told, self.count) for i in self._members(k)]
        if self.together:
            for k, rollouts in enumerate(_groups(self.scorer.finish(left), self.n)):
                self.on_group(self.first + k, rollouts)
            return
        for scorings in _groups(left, self.n):
            self._tell(scorings)

    def _members(self, k: int) -> range:
        return range(k * self.n, (k + 1) * self.n)

    def _tell(self, scorings: list[Scoring]) -> None:
        self.on_group(self.first + self.told, self.scorer.finish(scorings))
        self.told += 1


def _groups(values: list[T], n: int) -> Iterator[list[T]]:
    for begin in range(0, len(values), n):
        yield values[begin : begin + n]
