"""The registry of formats: how a row of a file becomes a Conversation or a Text, a Pair of them, or
one that is Labelled.

A format is one file with a FORMAT in it and one line here. `pkg.module:NAME` names one outside the
tree. `auto` takes the one format of the job's kind (samples, pairs, labelled answers) that
recognises the first readable row.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats.alpaca import FORMAT as ALPACA
from posttrain.data.formats.base import Format
from posttrain.data.formats.fields import FORMAT as FIELDS
from posttrain.data.formats.fields import kind_of
from posttrain.data.formats.hh import FORMAT as HH
from posttrain.data.formats.labelled import FORMAT as LABELLED
from posttrain.data.formats.llama_factory import FORMAT as LLAMA_FACTORY
from posttrain.data.formats.messages import FORMAT as MESSAGES
from posttrain.data.formats.preference import FORMAT as PREFERENCE
from posttrain.data.formats.prompt_completion import FORMAT as PROMPT_COMPLETION
from posttrain.data.formats.sharegpt import FORMAT as SHAREGPT
from posttrain.data.formats.text import FORMAT as TEXT
from posttrain.data.formats.ultrafeedback import FORMAT as ULTRAFEEDBACK
from posttrain.data.rows import SIDES, show
from posttrain.types import DataKind

FORMATS: dict[str, Format] = {
    "messages": MESSAGES,
    "sharegpt": SHAREGPT,
    "alpaca": ALPACA,
    "prompt_completion": PROMPT_COMPLETION,
    "text": TEXT,
    "fields": FIELDS,
    "preference": PREFERENCE,
    "hh": HH,
    "llama_factory": LLAMA_FACTORY,
    "ultrafeedback": ULTRAFEEDBACK,
    "labelled": LABELLED,
}

PLAIN_FIELDS = "user: question, assistant: answer"

__all__ = ["FORMATS", "Format", "find_format", "get_format"]


def get_format(name: str) -> Format:
    """The format of that name, or the Format at `pkg.module:NAME`. ValueError: there is none."""
    if name in FORMATS:
        return FORMATS[name]
    if ":" in name:
        module, attribute = name.split(":", 1)
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"format {name!r}: cannot be imported: {error}") from error
        if not isinstance(found, Format):
            raise ValueError(f"format {name!r}: is {type(found).__name__}, not a Format")
        return found
    raise ValueError(f"unknown format {name!r}: use auto, {', '.join(FORMATS)} or pkg.module:NAME")


def find_format(row: Any, cfg: SourceConfig, place: str, *, kind: DataKind = "samples") -> str:
    """The name of the format of a source, from its config or (auto) from one of its rows.

    Formats of this kind are asked for; where answers are judged one by one, those of pairs too.
    `place` (file:line) stands in the error. ValueError: no format, or several, recognise the row,
    or its data are of another kind.
    """
    wanted = "labelled" if kind == "twinned" else kind
    unpaired = ["pairs"] if wanted == "labelled" else []  # a pair's answers are labelled ones
    if cfg.format != "auto":
        named = get_format(cfg.format)
        if cfg.fields and cfg.format != "fields":
            raise ValueError(
                f"{place}: format: {cfg.format} with fields: only the format `fields` reads them; "
                "remove one of the two"
            )
        if named.kind not in (None, wanted, *unpaired):
            raise ValueError(f"{place}: format: {cfg.format} {_other_kind(wanted, named.kind)}")
    if cfg.fields or cfg.format == "fields":
        if (made := kind_of(cfg)) not in (wanted, *unpaired):
            fields = ", ".join(cfg.fields)
            raise ValueError(f"{place}: fields: {{{fields}}} {_other_kind(wanted, made)}")
        return "fields"
    if cfg.format != "auto":
        return cfg.format
    columns = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
    kinds = {
        made: [name for name, known in FORMATS.items() if known.kind == made and known.detect(row)]
        for made in _JOBS
    }
    if wanted == "samples":
        _refuse_judged(row, bool(kinds["pairs"]), columns, place)
    found = kinds[wanted] or [name for other in unpaired for name in kinds[other]]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{place}: the columns ({columns}) fit {' and '.join(found)}: "
            f"name one with format: {found[0]}"
        )
    both = isinstance(row, Mapping) and {"chosen", "rejected"} <= row.keys()
    if wanted == "pairs" and both:
        sides = [row[side] for side in SIDES]
        if not all(isinstance(side, str) for side in sides):
            shown = " and ".join(f"{name} is {show(row[name])}" for name in SIDES)
            raise ValueError(
                f"{place}: no format has such a pair (columns: {columns}): {shown}; each side is a "
                "text beside its prompt, or a list of messages"
            )
        raise ValueError(
            f"{place}: answers without what they answer (columns: {columns}): name its column, as "
            "in fields: {user: question, chosen: chosen, rejected: rejected}, or give both sides "
            "as lists of messages"
        )
    other = next((made for made in ("pairs", "labelled", "samples") if kinds[made]), None)
    if wanted != "samples" and other is not None:
        raise ValueError(
            f"{place}: {_SAID[other]} (columns: {columns}), not {_SHORT[wanted]}: "
            f"{_JOBS[other]} trains on them; {_HAVE[wanted]}, or fields that name them"
        )
    raise ValueError(
        f"{place}: no format recognises the columns ({columns}): map them, for example "
        f"fields: {{{_EXAMPLES[wanted]}}}, or name a format: {', '.join(_names(wanted))}"
    )


_JOBS = {
    "samples": "`posttrain sft`",
    "pairs": "`posttrain preference`",
    "labelled": "`posttrain preference loss.type=kto`",
}
_SAID = {
    "samples": "samples to imitate",
    "pairs": "pairs to prefer by",
    "labelled": "answers labelled good or bad",
}
_SHORT = {"samples": "samples", "pairs": "pairs", "labelled": "labelled answers"}
_HAVE = {
    "pairs": "a pair has the columns chosen and rejected",
    "labelled": "a labelled answer has the column label, true or false",
}
_EXAMPLES = {
    "samples": PLAIN_FIELDS,
    "pairs": "user: question, chosen: good, rejected: bad",
    "labelled": f"{PLAIN_FIELDS}, label: liked",
}


def _names(kind: str) -> list[str]:
    return [name for name, known in FORMATS.items() if known.kind in (kind, None)]


def _other_kind(wanted: str, made: str | None) -> str:
    parts = {"pairs": " (of fields: chosen and rejected)", "labelled": " (of fields: label)"}
    return (
        f"makes {_SAID[made or wanted]}, not {_SHORT[wanted]}: {_JOBS[made or wanted]} trains on "
        f"them; for {_SHORT[wanted]} use auto or one of {', '.join(_names(wanted))}"
        f"{parts.get(wanted, '')}"
    )


def _refuse_judged(row: Any, is_pair: bool, columns: str, place: str) -> None:
    """Answers that somebody judged bad are not imitated by chance."""
    if is_pair or (isinstance(row, Mapping) and {"chosen", "rejected"} <= row.keys()):
        raise ValueError(
            f"{place}: preference pairs (columns: {columns}), not samples to imitate: `posttrain "
            "preference` trains on them; to imitate the chosen side alone, name it: "
            "fields: {messages: chosen} or {prompt:, completion:}"
        )
    if isinstance(row, Mapping) and isinstance(row.get("label"), bool):
        raise ValueError(
            f"{place}: answers labelled good or bad (columns: {columns}), not a format to imitate: "
            f"{_JOBS['labelled']} trains on them; to imitate the good ones, leave the bad rows out "
            "and name the format, as in format: messages"
        )
