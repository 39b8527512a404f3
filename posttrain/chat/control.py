"""Control tokens written by the template against those that somebody typed.

An added token (`<|im_end|>`) is matched only where every one of its characters was written by the
template; the text between is encoded by a copy of the tokenizer without added tokens, so that a
typed `<|im_end|>` becomes the tokens of its seven-odd characters. Where all text is trusted this
gives what the whole tokenizer gives.

Source of the matching rules: `added_vocabulary.rs` of huggingface/tokenizers (leftmost, longest;
`lstrip`/`rstrip` swallow white space; `single_word` wants no letter beside it).
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

Offsets = list[tuple[int, int]]
Intervals = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Match:
    """One added token in a text: characters [start, end), `core` without swallowed spaces."""

    id: int
    start: int
    end: int
    core: tuple[int, int]


def covers(intervals: Intervals, start: int, end: int) -> bool:
    """Whether one of the sorted, disjoint intervals holds all of [start, end)."""
    k = bisect.bisect_right(intervals, (start, float("inf"))) - 1
    return k >= 0 and intervals[k][0] <= start and end <= intervals[k][1]


def is_control(token: dict[str, Any]) -> bool:
    """Runs of spaces are added tokens in some tokenizers, and control nothing."""
    return not token["content"].isspace()


class SectionEncoder:
    """Encodes text section by section, added tokens only where they may stand.

    description: the parsed tokenizer.json.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        self._tokens = {t["content"]: t for t in description["added_tokens"] if is_control(t)}
        raw = [t for t in self._tokens.values() if not t["normalized"]]
        normal = [t for t in self._tokens.values() if t["normalized"]]
        # tokens of the raw text first, those of the normalised text in what is left
        self._passes = [_pattern(group) for group in (raw, normal) if group]
        kept = [t for t in description["added_tokens"] if not is_control(t)]
        plain = {**description, "added_tokens": kept, "post_processor": None}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        later = _not_first(plain)
        self._later = tokenizers.Tokenizer.from_str(json.dumps(later)) if later else self._plain

    def encode(self, text: str, trusted: Intervals, prose: Intervals, in_prose: frozenset[str]):
        """(ids, offsets in characters) of the text.

        trusted: where any added token may stand. prose: where those of `in_prose` may, too.
        """
        ids: list[int] = []
        offsets: Offsets = []
        at = 0
        for match in [*self._matches(text, trusted, prose, in_prose), None]:
            end = match.start if match else len(text)
            if at < end:
                section = (self._later if at else self._plain).encode(
                    text[at:end], add_special_tokens=False
                )
                ids += section.ids
                offsets += [(at + a, at + b) for a, b in section.offsets]
            if match:
                ids.append(match.id)
                offsets.append(match.core)
                at = match.end
        return ids, offsets

    def _matches(self, text: str, trusted: Intervals, prose: Intervals, in_prose: frozenset[str]):
        def admitted(content: str, start: int, end: int) -> bool:
            return covers(trusted, start, end) or (
                content in in_prose and covers(prose, start, end)
            )

        found: list[Match] = []
        for pattern in self._passes:
            gaps = zip(
                [0, *(match.end for match in found)],
                [*(match.start for match in found), len(text)],
                strict=True,
            )
            new = [m for low, high in gaps for m in self._scan(pattern, text, low, high, admitted)]
            found = sorted(found + new, key=lambda match: match.start)
        return found

    def _scan(self, pattern: re.Pattern[str], text: str, low: int, high: int, admitted: Any):
        """The matches in text[low:high], left to right, as the tokenizer would find them."""
        at = previous = low
        while hit := pattern.search(text, at, high):
            token = self._tokens[hit.group()]
            start, end = hit.span()
            at = end
            if token["single_word"] and (
                (start > low and _is_word(text[start - 1])) or (end < high and _is_word(text[end]))
            ):
                continue
            if not admitted(token["content"], start, end):
                # a token that begins inside the refused one may still be the template's
                at = start + 1
                continue
            core = (start, end)
            if token["lstrip"]:
                start = max(previous, len(text[:start].rstrip()))
            if token["rstrip"]:
                end = high - len(text[end:high].lstrip())
            previous = at = end
            yield Match(token["id"], start, end, core)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _pattern(group: list[dict[str, Any]]) -> re.Pattern[str]:
    """Leftmost, longest: alternatives from long to short."""
    contents = sorted((t["content"] for t in group), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, contents)))


def _not_first(description: dict[str, Any]) -> dict[str, Any] | None:
    """The tokenizer for a section that does not open the text, where that makes a difference:
    Metaspace with prepend_scheme "first" prepends to the first section alone."""
    dumped = json.dumps(description["pre_tokenizer"])
    if '"prepend_scheme": "first"' not in dumped:
        return None
    later = dumped.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    return {**description, "pre_tokenizer": json.loads(later)}
