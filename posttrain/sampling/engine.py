"""The sampling engine: a fixed number of slots, filled anew as completions end.

A prompt is read once, however many completions share it, in a program of its own for each power of
two that prompts are padded to; what was read is copied into the slots of its completions, and one
program draws tokens in all slots, many steps between two looks of the host. Slots, the rows of a
prefill and the chunks of a cache have shapes that no request changes, and no operation joins two
rows: what a sequence gets depends, to the bit, on itself alone. On a CPU with a small model, slots
are decoded in groups, several at once (Engine._groups).

On several hosts each runs the same schedule: tokens and log-probs come back the same to all, and
nothing else (no clock, no thread) is asked. Requests, and what on_done gives back, must be the same
on all.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from posttrain.chat.tokenizer import Tokenizer
from posttrain.models.kv_cache import CHUNK
from posttrain.models.transformer import Transformer
from posttrain.sampling import decoder
from posttrain.sampling.decoder import Slots
from posttrain.sampling.request import Completion, OnDone, Request, Sampling
from posttrain.sampling.sampler import Choice, Uses
from posttrain.sampling.schedule import Active, OnToken, Schedule, bucket
from posttrain.sharding import batch_shards

STRIDE = 32
"""Decode steps between two looks of the host, where nobody waits for single tokens."""
SHORTEST = 32
"""Prompts are padded to at least this many tokens."""
READ_TOGETHER = 256
"""Tokens that each block of slots reads at once, of prompts that are shorter."""
GROUP = 8
"""Slots of a group where there are several (see Engine._groups)."""
CACHED = 16 * 2**20
"""Bytes of weights that a CPU is taken to hold in its cache."""


@dataclass
class _Group:
    """Slots that are decoded together."""

    slots: range
    rows: Any = None  # decoder.Rows, from the first prompt on
    room: int = 0  # tokens of each slot


class Engine:
    """A model ready to decode: its weights unstacked, in the compute dtype.

    slots: sequences that are decoded at once (rounded up to a multiple of the mesh's blocks of
    rows). length: the most tokens of a prompt with its completion; None: the model's context, and
    room is made for the longest that is asked for. tokenizer: for stop strings.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int = 32,
        length: int | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        leaves = jax.tree.leaves(nnx.state(model))
        self.spec, self.mesh, self._dtype = model.spec, leaves[0].sharding.mesh, model.compute.dtype
        self._shards = batch_shards(self.mesh)
        self._length, self._tokenizer = length, tokenizer
        self._graph = nnx.graphdef(model)
        self._weights, self._static = self._unstacked(model)
        groups = self._groups(slots)
        self._size = -(-slots // (groups * self._shards)) * self._shards
        self.slots = self._size * groups

    def _groups(self, slots: int) -> int:
        """How many groups the slots are decoded in, each apart from the others.

        One, but on a CPU that holds the weights in its cache: rows gain nothing there from being
        multiplied together, few are seldom all done or all waiting for the longest, and several
        groups keep several cores busy.
        """
        held = sum(weight.nbytes for weight in self._weights)
        alone = self.mesh.size == 1 and self.mesh.devices.flat[0].platform == "cpu"
        return -(-slots // GROUP) if alone and held <= CACHED else 1

    @property
    def context(self) -> int:
        """The most tokens of a prompt with its completion."""
        return min(self._length or self.spec.max_positions, self.spec.max_positions)

    def update(self, params: Any) -> None:
        """Decodes with these weights from now on: TrainState.params joined with the frozen ones."""
        self._weights = []  # gives their memory back before the new ones need theirs
        self._weights, self._static = self._unstacked(nnx.merge(self._graph, nnx.State(params)))

    def _unstacked(self, model: Transformer) -> Any:
        with jax.set_mesh(self.mesh):
            return decoder.unstack(model)

    def generate(
        self,
        requests: Sequence[Request],
        on_done: OnDone | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> list[list[Completion]]:
        """The completions of each request, as RolloutEngine says; on_token: see OnToken.

        Raises ValueError before anything runs if a request cannot be answered, and later if one
        that on_done gives back cannot.
        """
        wrong = [f"request {i}: {why}" for i, r in enumerate(requests) for why in self._refusals(r)]
        if wrong:
            more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
            raise ValueError("\n    ".join(["these cannot be answered:", *wrong[:10], *more]))
        if not requests:
            return []
        schedule = Schedule(requests, self.slots, self._tokenizer)
        with jax.set_mesh(self.mesh):
            self._run(schedule, 1 if on_token else STRIDE, on_done, on_token)
        return schedule.completions()

    def _refusals(self, request: Request) -> list[str]:
        """Why it cannot be answered."""
        size, sampling, vocab = len(request.tokens), request.sampling, self.spec.vocab_size
        wrong = []
        if size == 0:
            wrong.append("its prompt is empty")
        if (whole := size + sampling.max_new_tokens) > self.context:
            wrong.append(
                f"{size} tokens and max_new_tokens {sampling.max_new_tokens} are {whole}, there is "
                f"room for {self.context}"
            )
        if request.n < 1:
            wrong.append(f"n is {request.n}, expected at least 1")
        strange = [t for t in (*request.tokens, *sampling.logit_bias) if not 0 <= t < vocab]
        if strange:
            wrong.append(f"token {strange[0]} is not among the model's {vocab}")
        if sampling.stop and self._tokenizer is None:
            wrong.append("stop strings need an engine with a tokenizer")
        return wrong

    def _run(
        self, schedule: Schedule, stride: int, on_done: OnDone | None, on_token: OnToken | None
    ) -> None:
        """Groups take turns in one order; while one is looked at, others are decoded. A group that
        the others have room for ends, if they keep all cores busy."""
        starts = range(0, self.slots, self._size)
        resting = [_Group(range(start, start + self._size)) for start in starts]
        decoded: deque[tuple[_Group, Callable[[], Any]]] = deque()
        room, cores = 0, os.cpu_count() or 1
        with ThreadPoolExecutor(cores) as pool:
            while schedule.unfinished():
                room = max(room, self._room(schedule))
                for group in tuple(resting):
                    if len(decoded) >= cores:
                        free = sum(len(schedule.free(other.slots)) for other, _ in decoded)
                        if schedule.wanted(group.slots, free) <= free:
                            schedule.set_aside(group.slots, group.rows)
                            group.rows = None
                            continue
                    self._fill(schedule, group, room)
                    if schedule.live(group.slots):
                        resting.remove(group)
                        step = functools.partial(self._decode, *self._said(schedule, group, stride))
                        # one group alone stays in this thread: it may be one of several processes'
                        now = self._size == self.slots
                        decoded.append((group, step if now else pool.submit(step).result))
                group, wait = decoded.popleft()
                group.rows, found = wait()
                resting.insert(0, group)
                tokens, logps, plain = found
                for request in schedule.take(group.slots, tokens, logps, plain, on_done, on_token):
                    wrong = self._refusals(request) + ["n is not 1"] * (request.n != 1)
                    if wrong:
                        raise ValueError(f"a request that on_done gave back: {'; '.join(wrong)}")

    def _room(self, schedule: Schedule) -> int:
        """Tokens that slots must have room for: a multiple of CHUNK, one of a few numbers."""
        most = -(-self.context // CHUNK) * CHUNK
        if self._length:
            return most
        asked = (
            len(a.request.tokens) + a.request.sampling.max_new_tokens for a in schedule.waiting
        )
        return min(bucket(max(asked, default=1), CHUNK), most)

    def _fill(self, schedule: Schedule, group: _Group, room: int) -> None:
        """Reads prompts and puts them in the group's slots, while some wait and slots are free."""
        each = self._size // self._shards
        while schedule.waiting and schedule.free(group.slots):
            if group.rows is None:
                group.rows = decoder.empty(self._size, room, self.spec, self._dtype)
            elif group.room < room:
                group.rows = decoder.grown(group.rows, room, self.spec)
            group.room = room
            if (read := schedule.waiting[0].read) is None:
                read = self._read(schedule)
            table, counts = np.zeros((self._shards, each, 2), np.int32), [0] * self._shards
            for slot, row in schedule.place(read, group.slots):
                shard, place = divmod(slot - group.slots.start, each)
                table[shard, counts[shard]] = place, row
                counts[shard] += 1
            group.rows = decoder.place(group.rows, read, table, np.array(counts, np.int32))

    def _said(self, schedule: Schedule, group: _Group, stride: int) -> tuple[Any, ...]:
        """The arguments of _decode for a group that has live slots."""
        slots, uses = _said_of([schedule.active[i] for i in group.slots])
        # while others wait, the host looks as soon as an eighth of the slots is free, or three
        enough = max(3, -(-self._size // 8))
        floor = int(slots.live.sum()) - enough if schedule.waiting else 0
        longest = int(slots.lengths[slots.live].max()) + stride
        return group.rows, slots, uses, np.int32(max(floor, 0)), np.int32(longest), stride

    def _decode(self, rows: Any, *said: Any) -> tuple[decoder.Rows, list[np.ndarray]]:
        """(the group's rows, what was drawn), once it was."""
        slots, uses, floor, longest, stride = said
        with jax.set_mesh(self.mesh):  # a thread's own
            rows, found = decoder.decode(
                self._weights, rows, slots, uses, floor, longest, stride=stride, static=self._static
            )
            return rows, jax.device_get(found)

    def _read(self, schedule: Schedule) -> decoder.Rows:
        """Reads the prompts that come next."""
        asks = schedule.to_read(_width, self._height)
        width = _width(len(asks[0].request.tokens))
        height = self._height(width)
        tokens, lengths = np.zeros((height, width), np.int32), np.ones(height, np.int32)
        for i, ask in enumerate(asks):
            lengths[i] = len(ask.request.tokens)
            tokens[i, : lengths[i]] = ask.request.tokens
        read = decoder.prefill(self._weights, tokens, lengths, self._static)
        for i, ask in enumerate(asks):
            ask.read, ask.row = read, i
        return read

    def _height(self, width: int) -> int:
        """Prompts of this width that are read together: a row without one costs as much as any, and
        seldom are more than a quarter of the slots free at once."""
        most = self.slots // self._shards // 4
        return self._shards * max(1, min(most, READ_TOGETHER // width))


def _width(size: int) -> int:
    """What a prompt of this size is padded to."""
    return bucket(size, SHORTEST)


_FREE = Active(0, 0, Request([0], Sampling(temperature=0)), None)


def _said_of(active: Sequence[Active | None]) -> tuple[Slots, Uses]:
    """What the device is told of the slots."""
    shown = [one or _FREE for one in active]
    requests = [one.request for one in shown]
    how = [request.sampling for request in requests]

    def table(rows: list[Sequence[Any]], dtype: Any, blank: Any) -> np.ndarray:
        found = np.full((len(rows), bucket(max(map(len, rows)), 8)), blank, dtype)
        for line, row in zip(found, rows, strict=True):
            line[: len(row)] = row
        return found

    def each(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(sampling, name) for sampling in how], dtype)

    choice = Choice(
        temperature=each("temperature", np.float32),
        top_k=each("top_k", np.int32),
        top_p=each("top_p", np.float32),
        min_p=each("min_p", np.float32),
        repetition_penalty=each("repetition_penalty", np.float32),
        presence_penalty=each("presence_penalty", np.float32),
        biased=table([list(s.logit_bias) for s in how], np.int32, np.iinfo(np.int32).max),
        bias=table([list(s.logit_bias.values()) for s in how], np.float32, 0),
    )
    seeds = [(r.seed & 0xFFFFFFFF, r.seed >> 32 & 0xFFFFFFFF) for r in requests]
    slots = Slots(
        lengths=np.array([one.length for one in shown], np.int32),
        ends=np.array([one.end for one in shown], np.int32),
        live=np.array([one is not None for one in active]),
        stops=table([request.stop_ids for request in requests], np.int32, -1),
        seeds=np.array([(*s, one.which) for s, one in zip(seeds, shown, strict=True)], np.uint32),
        choice=choice,
    )
    penalties = (choice.repetition_penalty != 1) | (choice.presence_penalty != 0)
    uses = Uses(
        drawn=(choice.temperature > 0).any(),
        top_k=(choice.top_k > 0).any(),
        top_p=(choice.top_p < 1).any(),
        min_p=(choice.min_p > 0).any(),
        penalties=penalties.any(),
        bias=(choice.bias != 0).any(),
    )
    return slots, uses
