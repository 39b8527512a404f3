"""What becomes of an example that is longer than seq_len, and the twin of one that needs one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from posttrain.chat.config import ChatConfig
from posttrain.data.config import TooLong
from posttrain.types import TWIN, Conversation, Example, Message, Pair, Sample


@dataclass(frozen=True, slots=True)
class Fitted:
    """What is kept of one example, or of a pair's two sides, and what happened to it."""

    examples: list[Example]
    dropped: str | None = None  # why nothing is kept
    cut_tokens: int = 0
    cut_trained: int = 0
    idle_pieces: int = 0  # pieces of a split that trained nothing and are not kept


def trained(example: Example) -> int:
    """Tokens with a weight over 0."""
    return int(np.count_nonzero(example.loss_weights > 0))


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that both begin with."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


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


def fit_pair(
    chosen: Example, rejected: Example, seq_len: int, too_long: TooLong, bos_id: int | None
) -> Fitted:
    """Both sides in at most seq_len tokens each, or neither, by the rule `too_long`.

    truncate_end cuts each side's own end. truncate_start cuts one number of tokens off the start of
    the prompt of both, a leading BOS kept: they still answer the same prompt. Only what both sides
    begin with and neither trains can go, and one token of it stays. A pair of which a side has
    nothing left to train, or whose sides have become equal, is dropped.
    """
    sides = (chosen, rejected)
    longest = max(len(side.tokens) for side in sides)
    if longest <= seq_len:
        return Fitted([chosen, rejected])
    if too_long == "drop":
        return Fitted([], dropped="longer than seq_len")
    if too_long == "truncate_end":
        short = [Example(s.tokens[:seq_len], s.loss_weights[:seq_len]) for s in sides]
        if not all(map(trained, short)):
            return Fitted([], dropped="no trained token left on a side after truncate_end")
        if same(*short):
            return Fitted([], dropped="the sides are equal after truncate_end")
    elif too_long == "truncate_start":
        bos = int(bos_id is not None and all(side.tokens[0] == bos_id for side in sides))
        shared = common_prefix(chosen.tokens, rejected.tokens)
        prompt = min(shared, *(int(np.argmax(side.loss_weights > 0)) for side in sides))
        cut = longest - seq_len
        if cut > prompt - bos - 1:
            starts = (int(np.argmax(side.loss_weights > 0)) for side in sides)
            if min(starts) > prompt:
                return Fitted([], dropped="over seq_len, and the sides' prompts part too soon")
            return Fitted([], dropped="the answer alone is over seq_len")
        short = [_tail(side, bos, cut + bos, len(side.tokens)) for side in sides]
    else:
        raise ValueError(f"too_long={too_long!r} is not a way to shorten a pair")
    return Fitted(
        short,
        cut_tokens=sum(len(s.tokens) for s in sides) - sum(len(s.tokens) for s in short),
        cut_trained=sum(map(trained, sides)) - sum(map(trained, short)),
    )


@dataclass
class Twinned:
    """Rows, each followed by its mismatched twin, and their lines. cut: twins that lost the end of
    their answer. alone: rows that are left out, in whose block nobody answers another prompt."""

    examples: list[Example] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    cut: int = 0
    alone: int = 0


def with_twins(rows: list[Example], lines: list[int], block: int, seq_len: int) -> Twinned:
    """Within each block of so many rows the twin has the answer of the nearest row before it that
    has another prompt, the last row being before the first: where a batch is such a block, its
    mismatched answers are its own. A last block of one prompt joins the one before it.
    """
    prompts = [e.tokens[: int(np.argmax(e.loss_weights > 0))].tobytes() for e in rows]
    starts = list(range(0, len(rows), block))
    while len(starts) > 1 and len(set(prompts[starts[-1] :])) == 1:
        starts.pop()
    made = Twinned()
    for start, end in itertools.pairwise([*starts, len(rows)]):
        for i in range(start, end):
            before = [*range(i - 1, start - 1, -1), *range(end - 1, i, -1)]
            other = next((k for k in before if prompts[k] != prompts[i]), None)
            if other is None:
                made.alone += 1
                continue
            twin = _mismatched(rows[i], rows[other])
            made.cut += len(twin.tokens) > seq_len
            tokens, weights = twin.tokens[:seq_len], twin.loss_weights[:seq_len]
            made.examples += [rows[i], replace(twin, tokens=tokens, loss_weights=weights)]
            made.lines += [lines[i]] * 2
    return made


def by_label(pairs: int, block: int) -> list[int]:
    """The order of so many pairs' answers (chosen, rejected, chosen ...) in which a block of rows
    holds its chosen answers first: a twin has mostly an answer of its row's own label."""
    half = max(block // 2, 1)
    runs = [range(2 * p, 2 * min(p + half, pairs)) for p in range(0, pairs, half)]
    return [i for run in runs for side in (run[::2], run[1::2]) for i in side]


def _mismatched(row: Example, other: Example) -> Example:
    """The prompt of one and the answer of the other: what comes before its first trained token, and
    the rest."""
    prompt, answer = (int(np.argmax(e.loss_weights > 0)) for e in (row, other))
    weights = [np.zeros(prompt, np.float32), other.loss_weights[answer:]]
    tokens = np.concatenate([row.tokens[:prompt], other.tokens[answer:]])
    return Example(tokens, np.concatenate(weights), label=TWIN)


def same(a: Example, b: Example) -> bool:
    """Whether tokens and weights are equal."""
    return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.loss_weights, b.loss_weights)


def prompts_differ(pair: Pair, chosen: Example, rejected: Example, cfg: ChatConfig) -> bool:
    """Whether a pair's sides do not begin with the same tokens before the first trained one.

    A template may render the messages they share by what follows (earlier thinking dropped or
    kept). False too of texts, and where the sides part before what is trained: it cannot be told.
    """
    before, other = _before_training(pair.chosen, cfg), _before_training(pair.rejected, cfg)
    if before is None or before != other:
        return False
    starts = (int(np.argmax(side.loss_weights > 0)) for side in (chosen, rejected))
    return common_prefix(chosen.tokens, rejected.tokens) < min(starts)


def _before_training(sample: Sample, cfg: ChatConfig) -> Sequence[Message] | None:
    """The messages before the first trained one; None where that is not trained from its start."""
    if not isinstance(sample, Conversation):
        return None
    turns = [i for i, m in enumerate(sample.messages) if m["role"] == "assistant"]
    if cfg.train_on == "last":
        turn = turns[-1]
    else:
        turn = next(i for i in turns if sample.messages[i].get("weight", 1))
    answer = sample.messages[turn]
    thinks = "reasoning_content" in answer or "</think>" in answer["content"]
    return None if thinks and not cfg.train_thinking else sample.messages[:turn]


def _tail(example: Example, bos: int, start: int, end: int) -> Example:
    """[BOS +] tokens[start:end]; their first one has lost what it was predicted from."""
    tokens = np.concatenate([example.tokens[:bos], example.tokens[start:end]])
    weights = np.concatenate([example.loss_weights[:bos], example.loss_weights[start:end]])
    weights[: bos + 1] = 0
    return Example(tokens, weights)
