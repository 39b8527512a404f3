"""What becomes of an example that is longer than seq_len."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from posttrain.data.config import TooLong
from posttrain.types import Example


@dataclass(frozen=True, slots=True)
class Fitted:
    """What is kept of one example, and what happened to it."""

    examples: list[Example]
    dropped: str | None = None  # why nothing is kept
    cut_tokens: int = 0
    cut_trained: int = 0
    idle_pieces: int = 0  # pieces of a split that trained nothing and are not kept


def trained(example: Example) -> int:
    """Tokens with a weight over 0."""
    return int(np.count_nonzero(example.loss_weights > 0))


def fit(example: Example, seq_len: int, too_long: TooLong, bos_id: int | None) -> Fitted:
    """The example in at most seq_len tokens, by the rule `too_long` (all but `error`).

    truncate_start keeps a leading BOS. split makes pieces in which every token is a target just
    once: a later piece opens with BOS, if the example did, and with the last token of the piece
    before it, as context. What keeps no trained token is dropped.
    """
    n = len(example.tokens)
    if n <= seq_len:
        return Fitted([example])
    tokens, weights = example.tokens, example.loss_weights
    bos = int(bos_id is not None and tokens[0] == bos_id)
    if too_long == "drop":
        return Fitted([], dropped="longer than seq_len")
    if too_long == "split":
        pieces = [Example(tokens[:seq_len], weights[:seq_len])]
        start = seq_len  # the first token that has not been a target
        while start < n:
            end = min(n, start + seq_len - bos - 1)
            pieces.append(_tail(example, bos, start - 1, end))
            start = end
        kept = [piece for piece in pieces if trained(piece)]
        return Fitted(kept, idle_pieces=len(pieces) - len(kept))
    if too_long == "truncate_end":
        short = Example(tokens[:seq_len], weights[:seq_len])
    elif too_long == "truncate_start":
        short = _tail(example, bos, n - seq_len + bos, n)
    else:
        raise ValueError(f"too_long={too_long!r} is not a way to shorten an example")
    left = trained(short)
    if not left:
        return Fitted([], dropped=f"no trained token left after {too_long}")
    return Fitted([short], cut_tokens=n - seq_len, cut_trained=trained(example) - left)


def _tail(example: Example, bos: int, start: int, end: int) -> Example:
    """[BOS +] tokens[start:end]; their first one has lost what it was predicted from."""
    tokens = np.concatenate([example.tokens[:bos], example.tokens[start:end]])
    weights = np.concatenate([example.loss_weights[:bos], example.loss_weights[start:end]])
    weights[: bos + 1] = 0
    return Example(tokens, weights)
