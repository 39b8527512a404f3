"""Instructions whose keeping can be seen in the text: the kinds of IFEval, by its names.

Each is written from what the instruction asks for (Zhou et al. 2023, arXiv:2311.07911, appendix A).
Sentences and words are told apart by rules of our own, where IFEval uses NLTK: counts may differ by
a few in odd texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.rewards.languages import is_language

Check = Callable[[str, Mapping[str, Any]], bool | None]

_WORD = re.compile(r"\w+(?:[-'\N{RIGHT SINGLE QUOTATION MARK}]\w+)*")
_SHORT = r"Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|Inc|Ltd|Co|No|Fig|e\.g|i\.e|a\.m|p\.m|U\.S|[A-Z]"
_NO_END = re.compile(rf"\b(?:{_SHORT})\.(?=\s)")
_END = re.compile(
    r"[.!?\N{HORIZONTAL ELLIPSIS}]+[\"')\]*_\N{RIGHT DOUBLE QUOTATION MARK}]*(?=\s|$)"
)
_BULLET = re.compile(r"^\s*(?:\*(?!\*)|-(?!-)|\N{BULLET})\s*\S.*$", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*")
_CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _holds(count: int, relation: str, bound: int) -> bool:
    match relation:
        case "at least":
            return count >= bound
        case "less than":
            return count < bound
    raise ValueError(f"relation {relation!r}: it is 'at least' or 'less than'")


def sentences(text: str) -> int:
    """How many sentences; what stands on a line of its own without a full stop is one, too."""
    plain = _NO_END.sub(lambda match: match[0][:-1], text)
    return sum(bool(_WORD.search(part)) for line in plain.splitlines() for part in _END.split(line))


def _parts(text: str, mark: str) -> list[str] | None:
    """Text between marks; empty ones at the ends are dropped. None: one in between is empty."""
    parts = [part.strip() for part in text.split(mark)]
    parts = parts[1:] if not parts[0] else parts
    parts = parts[:-1] if parts and not parts[-1] else parts
    return parts if all(parts) else None


def _paragraphs(text: str, given: Mapping[str, Any]) -> bool:
    parts = _parts(text, "***")
    return parts is not None and len(parts) == given["num_paragraphs"]


def _first_word(text: str, given: Mapping[str, Any]) -> bool:
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    nth = given["nth_paragraph"]
    if len(paragraphs) != given["num_paragraphs"] or not 1 <= nth <= len(paragraphs):
        return False
    word = _WORD.search(paragraphs[nth - 1])
    return word is not None and word[0].lower() == str(given["first_word"]).lower()


def _two_responses(text: str, given: Mapping[str, Any]) -> bool:
    parts = _parts(text, "******")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _sections(text: str, given: Mapping[str, Any]) -> bool:
    mark = re.escape(str(given["section_spliter"]))
    return len(re.findall(rf"{mark}\s?\d+", text)) >= given["num_sections"]


def _json(text: str, given: Mapping[str, Any]) -> bool:
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)```\s*", text, re.DOTALL | re.IGNORECASE)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def _postscript(text: str, given: Mapping[str, Any]) -> bool:
    letters = re.findall(r"\w", str(given["postscript_marker"]))
    mark = r"\.?\s?".join(map(re.escape, letters))
    return re.search(rf"^\W*{mark}\b", text, re.MULTILINE | re.IGNORECASE) is not None


def _ends(text: str, given: Mapping[str, Any]) -> bool:
    plain = text.strip().strip('"').strip().lower()
    return plain.endswith(str(given["end_phrase"]).strip().lower())


def _keywords(text: str, given: Mapping[str, Any]) -> bool:
    return all(word.lower() in text.lower() for word in given["keywords"])


def _forbidden(text: str, given: Mapping[str, Any]) -> bool:
    words = given["forbidden_words"]
    return not any(re.search(rf"\b{re.escape(w)}\b", text, re.IGNORECASE) for w in words)


def _keyword_count(text: str, given: Mapping[str, Any]) -> bool:
    count = text.lower().count(str(given["keyword"]).lower())
    return _holds(count, given["relation"], given["frequency"])


def _letters(text: str, given: Mapping[str, Any]) -> bool:
    count = text.lower().count(str(given["letter"]).lower())
    return _holds(count, given["let_relation"], given["let_frequency"])


def _capital_words(text: str, given: Mapping[str, Any]) -> bool:
    count = sum(word.isupper() for word in _WORD.findall(text))
    return _holds(count, given["capital_relation"], given["capital_frequency"])


def _quoted(text: str, given: Mapping[str, Any]) -> bool:
    plain = text.strip()
    return len(plain) > 2 and plain[0] == plain[-1] == '"'


def _highlights(text: str, given: Mapping[str, Any]) -> bool:
    found = [match for match in _HIGHLIGHT.finditer(text) if (match[1] or match[2]).strip()]
    return len(found) >= given["num_highlights"]


INSTRUCTIONS: dict[str, Check] = {
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text, given: text.isupper(),
    "change_case:english_lowercase": lambda text, given: text.islower(),
    "combination:repeat_prompt": lambda text, given: (
        text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())
    ),
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": lambda text, given: (
        len(re.findall(r"\[[^\[\]]+\]", text)) >= given["num_placeholders"]
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": lambda text, given: (
        sum(choice in text for choice in _CHOICES) == 1
    ),
    "detectable_format:json_format": _json,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": lambda text, given: (
        len(_BULLET.findall(text)) == given["num_bullets"]
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": lambda text, given: (
        re.search(r"<<[^\n<>]*\w[^\n<>]*>>", text) is not None
    ),
    "keywords:existence": _keywords,
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": _keyword_count,
    "keywords:letter_frequency": _letters,
    "language:response_language": lambda text, given: is_language(text, given["language"]),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_sentences": lambda text, given: _holds(
        sentences(text), given["relation"], given["num_sentences"]
    ),
    "length_constraints:number_words": lambda text, given: _holds(
        len(_WORD.findall(text)), given["relation"], given["num_words"]
    ),
    "punctuation:no_comma": lambda text, given: "," not in text,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
}


def follows(text: str, name: str, given: Mapping[str, Any]) -> bool | None:
    """Whether the text keeps an instruction; None: it cannot be told. An empty one keeps none.

    ValueError: there is no such instruction, or it lacks an argument.
    """
    check = INSTRUCTIONS.get(name)
    if check is None:
        raise ValueError(f"no instruction {name!r}; there are {', '.join(INSTRUCTIONS)}")
    if not text.strip():
        return False
    try:
        return check(text, given)
    except KeyError as error:
        raise ValueError(f"instruction {name!r} needs the argument {error}") from error
