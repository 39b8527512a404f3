"""Does a model end its turn? Measured on the token ids of replies, never on decoded text.

A reply is what was generated after the prompt, its stop token included; a reply that ran to the
limit ends with some other token. All rates are `Mean`s, so that n travels with them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from posttrain.types import Mean

Reply = Sequence[int]


def stops(reply: Reply, stop_ids: Collection[int]) -> bool:
    """Did it end by itself: is its last token a stop token?"""
    return len(reply) > 0 and reply[-1] in stop_ids


def keeps_to_one_turn(
    reply: Reply, stop_ids: Collection[int], turn_openers: Collection[int]
) -> bool:
    """Did it end by itself before anything that opens another turn (a role's token or word)?"""
    return stops(reply, stop_ids) and not any(token in turn_openers for token in reply)


def stop_rate(replies: Sequence[Reply], stop_ids: Collection[int]) -> Mean:
    return _share([stops(reply, stop_ids) for reply in replies])


def one_turn_rate(
    replies: Sequence[Reply], stop_ids: Collection[int], turn_openers: Collection[int]
) -> Mean:
    """Raises ValueError if a stop token is also said to open a turn: every rate would be 0."""
    if both := sorted(set(stop_ids) & set(turn_openers)):
        raise ValueError(f"tokens {both} are given both as stops and as openers of a turn")
    return _share([keeps_to_one_turn(reply, stop_ids, turn_openers) for reply in replies])


def _share(outcomes: Sequence[bool]) -> Mean:
    return Mean(sum(outcomes), len(outcomes))
