"""Asks the rewards: each answer in a thread as soon as it is there, the sum once all are.

with Scorer(parts, shaping) as scorer:
    begun = [scorer.start(rollout) for rollout in as_they_end]
    rollouts = scorer.finish(begun)
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from posttrain.rewards.base import HandedReward, ManyReward, Reward, ScoreFunction
from posttrain.rewards.total import Shaping, check, combine
from posttrain.types import Rollout


class RewardError(ValueError):
    """A reward failed; says which, and on which prompt."""


@dataclass(frozen=True)
class Scoring:
    """An answer whose rewards are being asked for."""

    rollout: Rollout
    values: Future[dict[str, float | None]] = field(default_factory=Future)
    asked: list[tuple[str, float]] = field(default_factory=list)  # the part, and when, last first


class Scorer:
    """Parts of a sum, and the threads that ask them. Use it as a context, or close it.

    functions: by the name of the part, for those whose values the job hands in (a reward model).
    ConfigError: the parts don't fit each other. ValueError: a function is missing.
    """

    def __init__(
        self,
        parts: Mapping[str, Reward],
        shaping: Shaping | None = None,
        functions: Mapping[str, ScoreFunction] | None = None,
    ):
        check(parts)
        self.parts, self.shaping = dict(parts), shaping or Shaping()
        self._functions = dict(functions or {})
        handed = {name for name, part in self.parts.items() if isinstance(part, HandedReward)}
        if missing := sorted(handed - self._functions.keys()):
            raise ValueError(
                f"rewards {', '.join(missing)}: score by a model that this command does not load"
            )
        if unknown := sorted(self._functions.keys() - handed):
            raise ValueError(f"functions for {', '.join(unknown)}: no part takes one")
        self._todo: queue.SimpleQueue[Scoring | None] = queue.SimpleQueue()
        # daemons: a reward that hangs does not keep the process from ending
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name=f"reward-{k}")
            for k in range(self.shaping.threads)
        ]
        self._started = False

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Threads end once they have done what was begun."""
        if self._started:
            for _ in self._threads:
                self._todo.put(None)

    def start(self, rollout: Rollout) -> Scoring:
        """Asks the rewards that judge one answer at a time; comes back at once."""
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        scoring = Scoring(rollout)
        self._todo.put(scoring)
        return scoring

    def finish(self, begun: Sequence[Scoring]) -> list[Rollout]:
        """The answers with `rewards` by part and `reward`, in the order given, whole groups.

        Waits for the threads; asks, in this thread, those rewards that judge many answers at once.
        RewardError: one failed or hangs. Other errors are raised as they are (KeyboardInterrupt).
        """
        values = [dict(self._wait(scoring)) for scoring in begun]
        rollouts = [scoring.rollout for scoring in begun]
        for name, part in self.parts.items():
            if isinstance(part, ManyReward | HandedReward):
                found = self._many(name, part, rollouts)
                for row, value in zip(values, found, strict=True):
                    row[name] = value
        ordered = [{name: row[name] for name in self.parts} for row in values]
        scored = [replace(r, rewards=row) for r, row in zip(rollouts, ordered, strict=True)]
        return combine(self.parts, self.shaping, scored)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """All at once: start of each, and finish."""
        return self.finish([self.start(rollout) for rollout in rollouts])

    def _wait(self, scoring: Scoring) -> dict[str, float | None]:
        while True:
            try:
                return scoring.values.result(timeout=min(self.shaping.timeout, 1.0))
            except TimeoutError:
                if scoring.values.done():  # meanwhile, or with an error of this kind
                    return scoring.values.result()
            if scoring.asked:
                name, since = scoring.asked[-1]
                if (seconds := time.monotonic() - since) > self.shaping.timeout:
                    raise RewardError(
                        f"{self._place(name, scoring.rollout)}: no value after {seconds:.0f} s "
                        "(shaping.timeout)"
                    )

    def _work(self) -> None:
        while (scoring := self._todo.get()) is not None:
            try:
                scoring.values.set_result(self._alone(scoring))
            except BaseException as error:  # told in the thread that waits
                scoring.values.set_exception(error)

    def _alone(self, scoring: Scoring) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for name, part in self.parts.items():
            if isinstance(part, ManyReward | HandedReward):
                continue
            scoring.asked.append((name, time.monotonic()))
            if not _applies(part, scoring.rollout):
                found[name] = None
                continue
            place = self._place(name, scoring.rollout)
            try:
                value = part(scoring.rollout)
            except Exception as error:
                raise RewardError(f"{place}: {type(error).__name__}: {error}") from error
            found[name] = _checked(value, place)
        return found

    def _many(
        self, name: str, part: ManyReward | HandedReward, rollouts: Sequence[Rollout]
    ) -> list[float | None]:
        at = [k for k, rollout in enumerate(rollouts) if _applies(part, rollout)]
        chosen = [rollouts[k] for k in at]
        found: list[float | None] = [None] * len(rollouts)
        if not chosen:
            return found
        ask = part.many if isinstance(part, ManyReward) else self._functions[name]
        try:
            values = list(ask(chosen))
        except Exception as error:
            first, last = chosen[0].prompt.id, chosen[-1].prompt.id
            prompts = f"prompt {first}" if first == last else f"prompts {first} ... {last}"
            where = f"reward {name!r} ({_type_of(part)}) on {prompts}"
            raise RewardError(f"{where}: {type(error).__name__}: {error}") from error
        if len(values) != len(chosen):
            raise RewardError(
                f"reward {name!r} ({_type_of(part)}) gave {len(values)} values for "
                f"{len(chosen)} answers"
            )
        for k, value in zip(at, values, strict=True):
            found[k] = _checked(value, self._place(name, rollouts[k]))
        return found

    def _place(self, name: str, rollout: Rollout) -> str:
        return f"reward {name!r} ({_type_of(self.parts[name])}) on prompt {rollout.prompt.id}"


def _type_of(part: Reward) -> str:
    return f"{type(part).__module__}:{type(part).__qualname__}"


def _applies(part: Reward, rollout: Rollout) -> bool:
    return not part.only or rollout.prompt.source in part.only


def _checked(value: Any, place: str) -> float | None:
    """A finite number, or None; a bool counts as 0 or 1."""
    if value is None:
        return None
    if isinstance(value, bool | int | float | np.number | np.bool_) and math.isfinite(value):
        return float(value)
    raise RewardError(f"{place}: gave {value!r}: a reward is a finite number, or None")
