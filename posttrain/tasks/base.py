"""What a task is: prompts, what their answers are scored by, the tools that it offers.

The same task serves online learning, rejection sampling and evaluation.
"""

from __future__ import annotations

import hashlib
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

from posttrain.config import Config, ConfigError, semantic
from posttrain.types import Message, Prompt

Split = Literal["train", "held_out"]
Rewards = Mapping[str, Mapping[str, Any]]
"""A section `rewards`: name -> {type: ..., ...}."""
DRAWS = 10_000  # of one generated problem, before its limits are called impossible


@dataclass(frozen=True, slots=True)
class Question:
    """One problem: what is asked, what only the judges know, and tools of its own."""

    text: str  # the last message, the user's; "" = a tool's answer is the last of `messages`
    answer: Any = None  # JSON, as Prompt.answer
    tools: tuple[Mapping[str, Any], ...] = ()
    messages: tuple[Message, ...] = ()  # said before it, by a system prompt of its own, too
    id: str = ""  # of the row's own; "" = its number


class Prompts(Sequence[Prompt]):
    """Prompts made when they are looked at: the i-th is make(i), however often and in any order."""

    def __init__(self, count: int, make: Callable[[int], Prompt]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Prompts: ...
    def __getitem__(self, index: int | slice) -> Prompt | Prompts:
        chosen = range(self._count)[index]
        if isinstance(chosen, range):
            return Prompts(len(chosen), lambda i: self._make(chosen[i]))
        return self._make(chosen)

    def __iter__(self) -> Iterator[Prompt]:
        return map(self._make, range(self._count))


class Task(Config):
    """Base of every task. A user's own derives from it, from FileTask or from Generated."""

    name: ClassVar[str] = "task"
    """Opens the ids of its prompts, and is their source."""
    rewards: ClassVar[Rewards] = {}
    """What its answers are scored by where a run names no rewards: a section `rewards`."""
    right: ClassVar[str] = "correct"
    """The part of the rewards, if there is one of that name, that is 1 where an answer is right."""

    system: str = semantic("", help="system prompt of every prompt; empty: none")
    instruction: str = semantic(
        "", help="what is said after every question; empty: nothing but the question"
    )

    @property
    def tools(self) -> tuple[str, ...]:
        """Names of the tools that a model may call while it answers: a run makes them."""
        return ()

    @abstractmethod
    def prompts(self, split: Split) -> Sequence[Prompt]:
        """All prompts of a split, in an order that is the same in every run, made when looked at.

        Raises ConfigError where the task has no such split, BadRows (all defects) on bad files.
        """

    def prompt(self, split: Split, number: int, question: Question) -> Prompt:
        """The prompt of a question: the system prompt, what was said before, the question."""
        text = question.text
        if text and self.instruction:
            text += f"\n{self.instruction}"
        said = question.messages
        if self.system and not any(message["role"] == "system" for message in said):
            said = ({"role": "system", "content": self.system}, *said)
        asked = ({"role": "user", "content": text},) if text else ()
        return Prompt(
            id=question.id or f"{self.name}/{split}/{number}",
            messages=(*said, *asked),
            answer=question.answer,
            tools=question.tools,
            source=self.name,
        )


def is_held_out(key: str, one_in: int) -> bool:
    """One key in so many, by its hash alone: the same in every run, on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest(), "little") % one_in == 0


class Generated(Task):
    """Problems that are made, not read: the i-th of a split is a function of (seed, split, i).

    What is held out goes by a hash of the question, whatever the seed: no training problem is among
    the held-out ones of any run. Problems may come twice within a split.
    """

    size: int = semantic(10_000, gt=0, help="how many problems to train on")
    held_out_size: int = semantic(512, gt=0, help="how many held-out problems")
    held_out_one_in: int = semantic(
        8, ge=2, help="one problem in so many is held out, by a hash of its question"
    )
    seed: int = semantic(0, help="which problems are drawn")

    @abstractmethod
    def draw(self, rng: random.Random) -> Question | None:
        """A problem; None where what was drawn breaks the limits (it is drawn again)."""

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """ConfigError when a prompt is looked at: no problem within the limits can be found."""
        return Prompts(
            self.size if split == "train" else self.held_out_size,
            lambda i: self.prompt(split, i, self._question(split, i)),
        )

    def _question(self, split: Split, number: int) -> Question:
        rng = random.Random(f"{self.name} {self.seed} {split} {number}")
        for _ in range(DRAWS):
            drawn = self.draw(rng)
            if drawn and is_held_out(drawn.text, self.held_out_one_in) == (split == "held_out"):
                return drawn
        raise ConfigError(
            f"task: no {split} problem of {self.name} within its limits in {DRAWS:,} draws: "
            "widen them"
        )
