"""The host's side of the engine: who is read and placed when, and where a completion ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.chat.tokenizer import Tokenizer
from posttrain.sampling.request import Completion, Request, Sampling
from posttrain.sampling.schedule import Schedule, StopText, bucket
from tests.chat.samples import byte_tokenizer

FOUR = Sampling(max_new_tokens=4)


def prompt(size: int, n: int = 1, sampling: Sampling = FOUR) -> Request:
    return Request([1] * size, sampling, stop_ids=(0,), n=n)


def width(size: int) -> int:
    return bucket(size, 8)


def slots(schedule: Schedule) -> range:
    """All of them."""
    return range(len(schedule.active))


def read(schedule: Schedule, rows: int = 2) -> list[int]:
    """Places what was read, or reads the next prompts and places them: of which requests."""
    if (held := schedule.waiting[0].read) is not None:
        schedule.place(held, slots(schedule))
        return []
    asks = schedule.to_read(width, lambda _: rows)
    table = object()
    for row, ask in enumerate(asks):
        ask.read, ask.row = table, row
    schedule.place(table, slots(schedule))
    return [ask.index for ask in asks]


def say(schedule: Schedule, *lines: list[int], **options: Callable) -> list[Request]:
    """What is drawn in each slot; -1 beyond it, as the device has it."""
    steps = max(map(len, lines))
    tokens = np.array([line + [-1] * (steps - len(line)) for line in lines], np.int32)
    logps = -tokens.astype(np.float32)
    told = options.get("on_done"), options.get("on_token")
    return schedule.take(slots(schedule), tokens, logps, logps / 2, *told)


def test_prompts_of_one_width_are_read_together_and_wait_for_slots() -> None:
    schedule = Schedule([prompt(3), prompt(9), prompt(5), prompt(7), prompt(2)], 4, None)
    assert read(schedule) == [0, 2]
    assert [active.index for _, active in schedule.live(slots(schedule))] == [0, 2]
    assert read(schedule) == [1]
    assert read(schedule) == [3, 4]  # one of them has a slot to go to
    assert [(ask.index, ask.row) for ask in schedule.waiting] == [(4, 1)]
    assert schedule.free(slots(schedule)) == []


def test_a_prompt_is_read_once_for_all_its_completions() -> None:
    schedule = Schedule([prompt(3, n=3), prompt(4, n=2)], 2, None)
    assert read(schedule) == [0, 1]
    assert [active.which for _, active in schedule.live(slots(schedule))] == [0, 1]
    say(schedule, [5, 0], [6, 0])
    assert read(schedule) == []
    assert [(a.index, a.which) for _, a in schedule.live(slots(schedule))] == [(0, 2), (1, 0)]


def test_where_completions_end() -> None:
    schedule = Schedule([prompt(3), prompt(3)], 2, None)
    read(schedule)
    told: list[tuple[int, int, int]] = []
    say(schedule, [5, 6], [7, 0], on_token=lambda *args: told.append(args))
    assert told == [(0, 0, 5), (0, 0, 6), (1, 0, 7), (1, 0, 0)]
    assert [slot for slot, _ in schedule.live(slots(schedule))] == [0]
    say(schedule, [8, 9], [])
    assert schedule.completions() == [
        [Completion([5, 6, 8, 9], [-5, -6, -8, -9], [-2.5, -3, -4, -4.5], "length")],
        [Completion([7, 0], [-7, 0], [-3.5, 0], "stop")],
    ]
    assert not schedule.unfinished()


def test_a_follow_up_waits_before_all_others_and_keeps_its_number() -> None:
    schedule = Schedule([prompt(3, n=2), prompt(3)], 1, None)
    read(schedule)
    again = prompt(6)

    def on_done(index: int, which: int, completion: Completion) -> Request | None:
        return again if completion.finish == "stop" else None

    assert say(schedule, [5, 0], on_done=on_done) == [again]
    assert [(ask.index, list(ask.whichs)) for ask in schedule.waiting] == [
        (0, [0]),
        (0, [1]),
        (1, [0]),
    ]
    read(schedule)
    assert say(schedule, [6, 6, 6, 6], on_done=on_done) == []
    read(schedule)
    say(schedule, [7, 7, 7, 7], on_done=on_done)
    read(schedule)
    say(schedule, [8, 8, 8, 8], on_done=on_done)
    found = schedule.completions()
    assert [[c.tokens[0] for c in of] for of in found] == [[6, 7], [8]]


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> Tokenizer:
    return byte_tokenizer(data_dir, ("<|im_end|>",))


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("one. two three", (". ", ". t")),
        ("one\n\nQ: two", ("Q:", "never")),
        ("aab aaab aaab", ("aaab",)),  # a beginning that leads nowhere
        ("naïve — 漢字 and more", ("漢",)),  # characters of several tokens
        ("x<|im_end|>y", ("<|im_end|>",)),
    ],
)
def test_a_stop_string_ends_with_the_token_that_completes_it(
    tokenizer: Tokenizer, text: str, stops: tuple[str, ...]
) -> None:
    ids = tokenizer.encode(text).ids
    said = [tokenizer.decode(ids[: k + 1], skip_special_tokens=False) for k in range(len(ids))]
    first = next(k for k, text in enumerate(said) if any(stop in text for stop in stops))
    schedule = Schedule([prompt(1, sampling=Sampling(max_new_tokens=40, stop=stops))], 1, tokenizer)
    read(schedule)
    say(schedule, ids[:3])
    if schedule.unfinished():
        say(schedule, ids[3:])
    ((found,),) = schedule.completions()
    assert found.tokens == ids[: first + 1]
    assert found.finish == "stop"
    assert len(found.logps) == first + 1


class Bytes:
    """A tokenizer whose tokens are bytes, whole characters or not."""

    tokens = (b"a", b"!\xe6", b"\xbc\xa2", b"b")

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")


def test_a_stop_string_is_seen_where_the_same_token_begins_a_character() -> None:
    tokenizer: Any = Bytes()
    found = StopText(tokenizer, ["!"])
    assert [found.push(token) for token in (0, 1)] == [False, True]
    found = StopText(tokenizer, ["漢b"])
    assert [found.push(token) for token in (0, 1, 2, 3)] == [False, False, False, True]


def test_what_is_set_aside_goes_on_in_other_slots() -> None:
    """Slots 0 and 1 are a group, 2 and 3 another: the first ends, what it held goes on."""
    schedule = Schedule([prompt(3), prompt(3), prompt(3)], 4, None)
    first, second = range(2), range(2, 4)
    (ask, *others) = schedule.to_read(width, lambda _: 3)
    for row, each in enumerate([ask, *others]):
        each.read, each.row = "prompts", row
    assert schedule.place("prompts", first) == [(0, 0), (1, 1)]
    assert schedule.place("prompts", second) == [(2, 2)]
    drawn = np.array([[7, 0], [5, 6]], np.int32)
    schedule.take(first, drawn, drawn * 1.0, drawn * 2.0, None, None)
    assert [slot for slot, _ in schedule.live(first)] == [1]
    assert schedule.wanted(first, 9) == 1
    schedule.set_aside(first, "rows of the first")
    assert schedule.wanted(first, 9) == 1
    assert schedule.free(first) == [0, 1]
    assert schedule.place("rows of the first", second) == [(3, 1)]
    drawn = np.array([[4, 0], [8, 9]], np.int32)
    schedule.take(second, drawn, drawn * 1.0, drawn * 2.0, None, None)
    assert not schedule.unfinished()
    found = [completion.tokens for (completion,) in schedule.completions()]
    assert found == [[7, 0], [5, 6, 8, 9], [4, 0]]
