"""Which request is in which slot: the host's side of the engine, in numpy.

Decided from the requests and from the tokens that were drawn alone, in one order: several hosts
that see the same decide the same.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from posttrain.chat.tokenizer import StreamDecoder, Tokenizer
from posttrain.sampling.request import Completion, OnDone, Request

OnToken = Callable[[int, int, int], None]
"""Called with (index of the request, which of its n, token) as tokens come, in their order."""


def bucket(n: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


class StopText:
    """Looks for texts in tokens that come one at a time."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]):
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=False)
        self._texts, self._tail = texts, ""
        self._longest = max(map(len, texts))

    def push(self, token: int) -> bool:
        """Whether this token completes one of the texts."""
        text = self._tail + self._decoder.push(token)
        self._tail = text[-self._longest :]
        seen = text + self._decoder.pending()
        return any(stop in seen for stop in self._texts)


@dataclass
class Active:
    """A completion under way."""

    index: int
    which: int
    request: Request
    stop_text: StopText | None
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    plain_logps: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.request.tokens) + len(self.tokens)

    @property
    def end(self) -> int:
        """Its greatest length."""
        return len(self.request.tokens) + self.request.sampling.max_new_tokens

    def add(self, token: int, logp: float, plain_logp: float) -> Literal["stop", "length"] | None:
        """One token more; how the completion ends with it, if it does."""
        self.tokens.append(token)
        self.logps.append(logp)
        self.plain_logps.append(plain_logp)
        completed = self.stop_text is not None and self.stop_text.push(token)
        if completed or token in self.request.stop_ids:
            return "stop"
        return "length" if self.length == self.end else None


@dataclass
class Ask:
    """A prompt and those of its completions that have no slot yet."""

    index: int
    whichs: deque[int]
    request: Request
    read: Any = None  # what prefill made of the prompt
    row: int = 0  # in it
    begun: Active | None = None  # of a completion that had a slot before


class Schedule:
    """What waits, what is in the slots, what is done."""

    def __init__(self, requests: Sequence[Request], slots: int, tokenizer: Tokenizer | None):
        self.active: list[Active | None] = [None] * slots
        self.waiting = deque(Ask(i, deque(range(r.n)), r) for i, r in enumerate(requests))
        self._done: list[list[Completion | None]] = [[None] * r.n for r in requests]
        self._tokenizer = tokenizer

    def live(self, slots: range) -> list[tuple[int, Active]]:
        """(slot, what is in it) of those among `slots`."""
        return [(i, active) for i in slots if (active := self.active[i]) is not None]

    def free(self, slots: range) -> list[int]:
        return [i for i in slots if self.active[i] is None]

    def wanted(self, slots: range, most: int) -> int:
        """How many completions are in these slots or wait for one; beyond `most`, some number."""
        found = len(self.live(slots))
        for ask in self.waiting:
            if found > most:
                break
            found += len(ask.whichs)
        return found

    def set_aside(self, slots: range, rows: Any) -> None:
        """What is in these slots, and in `rows` on device, waits for others."""
        for slot, active in self.live(slots):
            row = slot - slots.start
            which = deque([active.which])
            self.waiting.append(Ask(active.index, which, active.request, rows, row, active))
            self.active[slot] = None

    def unfinished(self) -> bool:
        return bool(self.waiting) or any(active is not None for active in self.active)

    def completions(self) -> list[list[Completion]]:
        """Of all requests, once nothing is unfinished."""
        return [[c for c in found if c is not None] for found in self._done]

    def to_read(self, width_of: Callable[[int], int], rows: Callable[[int], int]) -> list[Ask]:
        """The prompts to read next, together: the first, and more that are padded to its width, as
        many as `rows` says: what has no slot yet will have one soon."""
        width = width_of(len(self.waiting[0].request.tokens))
        alike = (
            ask
            for ask in self.waiting
            if ask.read is None and width_of(len(ask.request.tokens)) == width
        )
        return list(itertools.islice(alike, rows(width)))

    def place(self, read: Any, slots: range) -> list[tuple[int, int]]:
        """(slot, row of `read`) of the completions that now get one of `slots`."""
        free, moves = deque(self.free(slots)), []
        for ask in self.waiting:
            while ask.read is read and ask.whichs and free:
                slot, which = free.popleft(), ask.whichs.popleft()
                self.active[slot] = ask.begun or self._begin(ask, which)
                moves.append((slot, ask.row))
        self.waiting = deque(ask for ask in self.waiting if ask.whichs)
        return moves

    def _begin(self, ask: Ask, which: int) -> Active:
        stop = ask.request.sampling.stop
        text = StopText(self._tokenizer, stop) if stop and self._tokenizer else None
        return Active(ask.index, which, ask.request, text)

    def take(
        self,
        slots: range,
        tokens: np.ndarray,
        logps: np.ndarray,
        plain_logps: np.ndarray,
        on_done: OnDone | None,
        on_token: OnToken | None,
    ) -> list[Request]:
        """What was drawn in these slots: arrays of [slots, steps], token -1 where one had ended.

        Gives the requests that on_done gave back; they wait before all others.
        """
        more: list[Ask] = []
        for slot, active in self.live(slots):
            line = slot - slots.start
            steps = int((tokens[line] >= 0).sum())
            row = (x[line, :steps].tolist() for x in (tokens, logps, plain_logps))
            for token, logp, plain_logp in zip(*row, strict=True):
                finish = active.add(token, logp, plain_logp)
                if on_token:
                    on_token(active.index, active.which, token)
                if finish is not None:  # what was drawn after a stop string is not kept
                    self.active[slot] = None
                    done = Completion(active.tokens, active.logps, active.plain_logps, finish)
                    self._done[active.index][active.which] = done
                    request = on_done(active.index, active.which, done) if on_done else None
                    if request is not None:
                        more.append(Ask(active.index, deque([active.which]), request))
                    break
        self.waiting.extendleft(reversed(more))
        return [ask.request for ask in more]
