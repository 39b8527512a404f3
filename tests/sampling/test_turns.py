"""Rates of stopping and of keeping to one turn, on token lists written by hand."""

from __future__ import annotations

import math

import pytest

from posttrain.sampling.turns import keeps_to_one_turn, one_turn_rate, stop_rate, stops

END, TEXT_END, USER, ASSISTANT = 3, 2, 5, 6
STOPS, OPENERS = (END, TEXT_END), (USER, ASSISTANT)

REPLIES = [
    # (reply, stops by itself, keeps to one turn)
    ([10, 11, END], True, True),
    ([END], True, True),
    ([10, TEXT_END], True, True),
    ([10, 11, 12], False, False),  # ran to the limit
    ([10, USER, 11, END], True, False),  # wrote the user's part too, then stopped
    ([10, ASSISTANT, END], True, False),
    ([10, USER], False, False),
    ([10, END, 11], False, False),  # a stop that is not at the end did not stop it
    ([], False, False),
]


@pytest.mark.parametrize(("reply", "stopped", "one"), REPLIES)
def test_one_reply(reply: list[int], stopped: bool, one: bool) -> None:
    assert stops(reply, STOPS) is stopped
    assert keeps_to_one_turn(reply, STOPS, OPENERS) is one


def test_rates_carry_their_n() -> None:
    replies = [reply for reply, _, _ in REPLIES]
    stopped, one = stop_rate(replies, STOPS), one_turn_rate(replies, STOPS, OPENERS)
    assert (stopped.total, stopped.count) == (5, 9)
    assert (one.total, one.count) == (3, 9)
    assert stopped.value == pytest.approx(5 / 9)
    assert math.isnan(stop_rate([], STOPS).value)


def test_a_stop_that_opens_a_turn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3\].*both"):
        one_turn_rate([[3]], STOPS, (USER, END))
