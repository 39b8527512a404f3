"""The registry of formats: how a row of a file becomes a Conversation, a Text or a Pair of them.

A format is one file with a FORMAT in it and one line here. `pkg.module:NAME` names one outside the
tree. `auto` takes the one format of the job's kind (samples, pairs) that recognises the first
readable row.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats.alpaca import FORMAT as ALPACA
from posttrain.data.formats.base import Format
from posttrain.data.formats.fields import FORMAT as FIELDS
from posttrain.data.formats.hh import FORMAT as HH
from posttrain.data.formats.llama_factory import FORMAT as LLAMA_FACTORY
from posttrain.data.formats.messages import FORMAT as MESSAGES
from posttrain.data.formats.preference import FORMAT as PREFERENCE
from posttrain.data.formats.prompt_completion import FORMAT as PROMPT_COMPLETION
from posttrain.data.formats.sharegpt import FORMAT as SHAREGPT
from posttrain.data.formats.text import FORMAT as TEXT
from posttrain.data.formats.ultrafeedback import FORMAT as ULTRAFEEDBACK

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


def find_format(row: Any, cfg: SourceConfig, place: str, *, pairs: bool = False) -> str:
    """The name of the format of a source, from its config or (auto) from one of its rows.

    `pairs`: formats of pairs are asked for, not of samples. `place` (file:line) stands in the
    error. ValueError: no format, or several, recognise the row, or its data are of the other kind.
    """
    if cfg.format != "auto":
        named = get_format(cfg.format)
        if cfg.fields and cfg.format != "fields":
            raise ValueError(
                f"{place}: format: {cfg.format} with fields: only the format `fields` reads them; "
                "remove one of the two"
            )
        if named.pairs is not None and named.pairs != pairs:
            raise ValueError(f"{place}: format: {cfg.format} {_other_kind(pairs)}")
    if cfg.fields or cfg.format == "fields":
        if ({"chosen", "rejected"} <= cfg.fields.keys()) != pairs:
            raise ValueError(f"{place}: fields: {{{', '.join(cfg.fields)}}} {_other_kind(pairs)}")
        return "fields"
    if cfg.format != "auto":
        return cfg.format
    columns = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
    kinds = {
        kind: [name for name, known in FORMATS.items() if known.pairs is kind and known.detect(row)]
        for kind in (False, True)
    }
    if not pairs:
        _refuse_judged(row, bool(kinds[True]), columns, place)
    found = kinds[pairs]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{place}: the columns ({columns}) fit {' and '.join(found)}: "
            f"name one with format: {found[0]}"
        )
    if pairs and isinstance(row, Mapping) and {"chosen", "rejected"} <= row.keys():
        raise ValueError(
            f"{place}: answers without what they answer (columns: {columns}): name its column, as "
            "in fields: {user: question, chosen: chosen, rejected: rejected}, or give both sides "
            "as lists of messages"
        )
    if pairs and kinds[False]:
        raise ValueError(
            f"{place}: samples to imitate (columns: {columns}), not pairs: `posttrain sft` trains "
            "on them; a pair has the columns chosen and rejected, or fields that name them"
        )
    example = "user: question, chosen: good, rejected: bad" if pairs else PLAIN_FIELDS
    raise ValueError(
        f"{place}: no format recognises the columns ({columns}): map them, for example "
        f"fields: {{{example}}}, or name a format: {', '.join(_names(pairs))}"
    )


def _names(pairs: bool) -> list[str]:
    return [name for name, known in FORMATS.items() if known.pairs in (pairs, None)]


def _other_kind(pairs: bool) -> str:
    names = ", ".join(_names(pairs))
    if pairs:
        return (
            "makes samples to imitate, not pairs: `posttrain sft` trains on them; for pairs use "
            f"auto or one of {names} (of fields: chosen and rejected)"
        )
    return (
        "makes pairs to prefer by, not samples: `posttrain preference` trains on them; for "
        f"samples use auto or one of {names}"
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
            "leave the bad rows out, then name the format, as in format: messages"
        )
