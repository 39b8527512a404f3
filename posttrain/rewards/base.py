"""What a reward is, and what its part of the config may do with its value.

A reward is a callable (Rollout) -> float | None; None: it does not apply to this answer. One with
settings is a Reward class; one without may be a plain function, named as `pkg.module:function`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from posttrain.config import Config, resolve, semantic
from posttrain.config_fields import Variant
from posttrain.types import Rollout

Scope = Literal["none", "group", "batch"]
Unit = Literal["tokens", "words", "characters"]


class Gate(Config):
    """The part counts only where another part's value, as it was given, is high enough."""

    part: str = semantic(help="name of the other part")
    at_least: float = semantic(1.0, help="the value of it that opens the gate")
    otherwise: float = semantic(0.0, help="what the part is worth where the gate is shut")


class Cosine(Config):
    """What a right and a wrong answer are worth by their length in tokens.

        low + (high - low) (1 + cos(pi min(length / max_length, 1))) / 2

    A right answer goes from correct[1] (short) down to correct[0] (long), a wrong one from wrong[0]
    (short) up to wrong[1] (long).
    Source: Yeo et al. 2025 (arXiv:2502.03373), section 4 and appendix C.1.
    """

    max_length: int = semantic(gt=0, help="tokens from which on nothing changes")
    correct: tuple[float, float] = semantic((0.5, 1.0), help="a right answer: longest, shortest")
    wrong: tuple[float, float] = semantic((-1.0, -0.5), help="a wrong answer: shortest, longest")
    at_least: float = semantic(1.0, help="the part's value that makes an answer a right one")


class Reward(Config):
    """A part of the sum. What is set here is done to its value in this order:

    cosine, times scale, gate, z-score, clip, times weight.
    """

    weight: float = semantic(1.0, help="the factor of its shaped value in the sum; 0: logged alone")
    scale: float = semantic(1.0, help="what the value is multiplied by first")
    gate: Gate | None = semantic(None, help="another part that must hold for this one to count")
    cosine: Cosine | None = semantic(None, help="a right answer is worth more if short")
    zscore: Scope | None = semantic(
        None, help="over a group or the batch: less the mean, by the deviation; null: shaping.parts"
    )
    clip: tuple[float, float] | None = semantic(None, help="least and greatest, after the z-score")
    only: tuple[str, ...] = semantic((), help="tasks whose answers it applies to; none = all")

    @field_validator("clip")
    @classmethod
    def _ordered(cls, clip: tuple[float, float] | None) -> tuple[float, float] | None:
        if clip is not None and clip[0] > clip[1]:
            raise ValueError(f"the least value comes first: [{clip[1]}, {clip[0]}]")
        return clip

    @abstractmethod
    def __call__(self, rollout: Rollout) -> float | None:
        """The value of one answer; None: does not apply. Called in threads, several at once."""


class ManyReward(Reward):
    """A reward that is better asked about many answers at once, or that compares them."""

    @abstractmethod
    def many(self, rollouts: Sequence[Rollout]) -> Sequence[float | None]:
        """A value per answer. Called in the thread that asks for the sum, with all of a batch that
        it applies to, whole groups of them."""

    def __call__(self, rollout: Rollout) -> float | None:
        return self.many([rollout])[0]


ScoreFunction = Callable[[Sequence[Rollout]], Sequence[float | None]]


class HandedReward(Reward):
    """A reward whose values come from a function that the job hands in, as of a model it loads."""

    def __call__(self, rollout: Rollout) -> float | None:
        raise ValueError(f"{type(self).__name__} scores by a function that the job hands in")


class FunctionReward(Reward):
    """A plain function as a part; a class of it is made for each function that a config names."""

    function: ClassVar[Callable[[Rollout], float | None]]

    def __call__(self, rollout: Rollout) -> float | None:
        return type(self).function(rollout)


@cache
def _class_of(name: str, function: Callable[[Rollout], float | None]) -> type[FunctionReward]:
    class Made(FunctionReward):
        pass

    Made.function = staticmethod(function)
    Made.__module__, _, Made.__qualname__ = name.partition(":")  # what a config names it by
    Made.__name__ = Made.__qualname__
    return Made


class RewardVariant(Variant):
    """As config.variant; `pkg.module:name` may be a plain function (Rollout) -> float | None."""

    def config_class(self, name: Any) -> type[Config]:
        if isinstance(name, str) and ":" in name:
            found = resolve(self.registry, name)
            if callable(found) and not isinstance(found, type):
                return _class_of(name, found)
        return super().config_class(name)


def answer_text(rollout: Rollout) -> str:
    """What the last turn says to the user: its text without the thinking and the tool calls."""
    return rollout.messages[-1].get("content") or ""


def length_of(rollout: Rollout, unit: Unit) -> int:
    """How long an answer is; tokens: all that were sampled, else of the last turn as sampled.

    ValueError: an answer without tokens (from a server or a file) has no length in them.
    """
    if unit == "characters":
        return len(rollout.text)
    if unit == "words":
        return len(rollout.text.split())
    if not len(rollout.loss_weights) and rollout.text:
        raise ValueError("an answer that came without its tokens has no length in tokens")
    return rollout.length


def expected(rollout: Rollout, key: str) -> Any:
    """What the prompt gives as the right answer; of a mapping the value at `key`, if there is one.

    None: there is none.
    """
    answer = rollout.prompt.answer
    if not key:
        return answer
    return answer.get(key) if isinstance(answer, Mapping) else None
