"""Which characters of a rendered conversation the assistant must write.

A turn begins where the generation prompt ends: at the length of the rendering of what came before
it, with the generation prompt, where that is a prefix of the text. It ends with the first stop
token after the turn's last character of content, in text that the template wrote for this very
message. A template that marks its turns with `{% generation %}` is taken at its word instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from posttrain.chat.trace import Trace
from posttrain.chat.traced import FIELD, LITERAL, NOBODY, ROLE, VALUE, Tag

PREFIX, SWITCH, TURN, MARKED = "prefix", "thinking switch", "turn", "generation"
_CLOSE = re.compile(r"(</think>|</thinking>|</reasoning>|\[/THINK\]|<\|END_THINKING\|>)\s*")
_OPEN = re.compile(r"\s*(<think>|<thinking>|<reasoning>|\[THINK\]|<\|START_THINKING\|>)")


class SpanError(Exception):
    """No exact span: str(error) is the reason, for the user."""


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of one assistant turn, its stop token last.

    tail: where the turn's own text after the stop ends (>= end). thinking: where its thinking
    ends (start where there is none). how: PREFIX, SWITCH, TURN or MARKED. stop: the stop token.
    """

    message: int
    start: int
    end: int
    tail: int
    thinking: int
    how: str
    stop: str


@dataclass(frozen=True)
class Prompt:
    """What a turn may begin after. text: everything before it and the generation prompt;
    before: the same without the generation prompt, None where that cannot be rendered."""

    text: str
    before: str | None
    how: str


class Piece(NamedTuple):
    """One run of a trace: text[start:end] of one source."""

    start: int
    end: int
    tag: Tag


def pieces_of(trace: Trace) -> list[Piece]:
    """The runs of a trace with their places."""
    out, at = [], 0
    for length, tag in trace.runs:
        out.append(Piece(at, at + length, tag))
        at += length
    return out


class SpanFinder:
    """Finds the spans of one rendered conversation.

    roles: of each message. stops: the tokens that end a turn, as text.
    """

    def __init__(self, trace: Trace, roles: Sequence[str], stops: Collection[str]) -> None:
        self.text = trace.text
        self.blocks = trace.blocks
        self.pieces = pieces_of(trace)
        self.roles = roles
        self.stops = stops
        self.fields: dict[int, list[Piece]] = {}
        for piece in self.pieces:
            if piece.tag.kind == FIELD:
                self.fields.setdefault(piece.tag.owner, []).append(piece)

    def marked(self, turns: Collection[int]) -> list[Span]:
        """The spans of `{% generation %}` blocks that belong to these turns."""
        edges: dict[int, list[int]] = {}
        for piece in self.pieces:
            if piece.tag.block:
                edges.setdefault(piece.tag.block, []).extend((piece.start, piece.end))
        spans = []
        for block, places in sorted(edges.items()):
            start, end = min(places), max(places)
            owner = self._block_owner(block, start, end)
            if owner not in turns:
                continue
            self._refuse_others(owner, start, end, fields_only=True)
            stop = next((s for s in self.stops if self.text[start:end].rstrip().endswith(s)), "")
            thinking = self._thinking_end(owner, start, end)
            spans.append(Span(owner, start, end, end, thinking, MARKED, stop))
        return spans

    def _block_owner(self, block: int, start: int, end: int) -> int:
        owner = self.blocks[block]
        if owner != NOBODY:
            return owner
        within = [p.tag for p in self.pieces if start <= p.start < end]
        inside = {tag.owner for tag in within if tag.kind == FIELD} - {NOBODY}
        if len(inside) != 1:
            raise SpanError("a {% generation %} block belongs to no one message")
        return inside.pop()

    def turn(self, index: int, prompts: Sequence[Prompt], encode: Callable[[str], Any]) -> Span:
        """The span of one assistant turn. encode: text -> Encoding, to compare by tokens.

        SpanError with the reason where there is none.
        """
        own = self._own(index)
        first = own[0].start if own else None
        start, how = self._start(index, first, prompts, encode)
        after = own[-1].end if own else start
        tail = self._tail(index, after)
        stop_at, stop = self._stop(after, tail)
        end = stop_at + len(stop)
        self._refuse_others(index, start, end)
        self._refuse_early_stop(index, start, after)
        return Span(index, start, end, tail, self._thinking_end(index, start, end), how, stop)

    def _own(self, index: int) -> list[Piece]:
        """The pieces of a message's fields, up to the first text of another message."""
        own: list[Piece] = []
        for piece in self.pieces:
            if piece.tag.owner == index and piece.tag.kind == FIELD:
                own.append(piece)
            elif own and piece.tag.owner not in (index, NOBODY):
                break
        return own

    def tail_text(self, index: int) -> str:
        """What the template writes after the last character of a turn, for this turn."""
        own = self._own(index)
        return self.text[own[-1].end : self._tail(index, own[-1].end)] if own else ""

    def _start(
        self,
        index: int,
        first: int | None,
        prompts: Sequence[Prompt],
        encode: Callable[[str], Any],
    ) -> tuple[int, str]:
        limit = len(self.text) if first is None else first
        for prompt in prompts:
            if self.text.startswith(prompt.text) and self._opens(limit, len(prompt.text)):
                return len(prompt.text), prompt.how
        begin = next(
            (p.start for p in self.pieces if p.tag.owner == index and p.tag.kind != VALUE), None
        )
        if begin is None:
            raise SpanError("the template does not say where the turn begins")
        best = None
        for prompt in prompts:
            if prompt.before is None or not prompt.text.startswith(prompt.before):
                continue
            # white space around the header may differ: the role's own text is what must agree
            header = prompt.text[len(prompt.before) :].lstrip()
            turn = _skip_space(self.text, begin) if header else begin
            matched = _common_tokens(header, self.text[turn : limit + 1], encode)
            if not header or matched:
                best = max(best or 0, min(turn + matched, limit))
        if best is None:
            raise SpanError("the generation prompt matches nothing at the turn")
        return best, TURN

    def _opens(self, first: int, start: int) -> bool:
        """Whether a turn whose text begins at `first` may be trained from `start` on: not when
        some of it comes before, unless that is the thinking tag that the prompt writes too."""
        return start <= first or bool(_OPEN.fullmatch(self.text[first:start].rstrip()))

    def _tail(self, index: int, after: int) -> int:
        """Where the template's own text for this turn, from `after` on, ends."""
        last = index == len(self.roles) - 1
        end = after
        for piece in self.pieces:
            if piece.end <= after:
                continue
            if piece.tag.kind == VALUE:
                continue  # a number among the arguments of a call: the turn's if its text goes on
            mine = piece.tag.owner == index or (piece.tag.owner == NOBODY and last)
            if not mine or piece.tag.kind not in (LITERAL, ROLE):
                break
            end = piece.end
        return end

    def _stop(self, after: int, tail: int) -> tuple[int, str]:
        """The first stop token in text[after:tail]."""
        text = self.text[after:tail]
        found = [(text.find(stop), stop) for stop in self.stops if stop and stop in text]
        if found:
            # the longest of those that begin first
            place, stop = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            return after + place, stop
        shown = f"only {text!r}" if text else "no text"
        raise SpanError(
            f"the turn ends with no stop token ({shown} follows it): name one in `chat.stop` "
            "or use another template"
        )

    def _refuse_others(self, index: int, start: int, end: int, fields_only: bool = False) -> None:
        for piece in self.pieces:
            if piece.end <= start or piece.start >= end or piece.tag.kind == VALUE:
                continue
            owner = piece.tag.owner
            if owner == index or (owner == NOBODY and piece.tag.kind != FIELD):
                continue
            if fields_only and (piece.tag.kind != FIELD or self._writes(owner)):
                continue
            who = "the tools" if owner == NOBODY else f"message {owner} ({self.roles[owner]})"
            raise SpanError(f"text of {who} stands inside the turn of message {index}")
        for piece in self.fields.get(index, ()):
            if fields_only:
                break
            if not self._opens(piece.start, start) or piece.end > end:
                raise SpanError(f"text of message {index} stands outside its turn")

    def _refuse_early_stop(self, index: int, start: int, after: int) -> None:
        """Generation would end in the middle of a turn that holds a stop token of the template."""
        for piece in self.pieces:
            if piece.tag.kind == LITERAL and start <= piece.start and piece.end <= after:
                text = self.text[piece.start : piece.end]
                for stop in self.stops:
                    if stop and stop in text:
                        raise SpanError(f"{stop!r} stands in the middle of message {index}")

    def _writes(self, owner: int) -> bool:
        return owner != NOBODY and self.roles[owner] == "assistant"

    def _thinking_end(self, index: int, start: int, end: int) -> int:
        """Where the thinking at the head of a span ends; start where it does not think."""
        inside = [p for p in self.fields.get(index, ()) if start <= p.start and p.end <= end]
        thoughts = [p for p in inside if p.tag.field in ("reasoning_content", "thinking")]
        if not thoughts:
            opened = _OPEN.match(self.text, start, end)
            before = _OPEN.search(self.text[max(0, start - 32) : start])
            if not opened and not (before and self.text[:start].rstrip().endswith(before[1])):
                return start
            close = _CLOSE.search(self.text, start, end)
            return close.end() if close else start
        done = thoughts[-1].end
        answer = next((p for p in inside if p.start >= done and p not in thoughts), None)
        close = _CLOSE.match(self.text, _skip_space(self.text, done), end)
        if close:
            return close.end()
        return answer.start if answer else done


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _common_tokens(header: str, text: str, encode: Callable[[str], Any]) -> int:
    """Characters of `header` that `text` shares with it, in whole tokens of both."""
    wanted, got = encode(header), encode(text)
    matched = 0
    for i, (a, b) in enumerate(zip(wanted.ids, got.ids, strict=False)):
        if a != b or wanted.offsets[i] != got.offsets[i]:
            break
        matched = wanted.offsets[i][1]
    return matched if header[:matched] == text[:matched] else 0
