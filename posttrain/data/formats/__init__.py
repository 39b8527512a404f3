"""The registry of formats: how a row of a file becomes a Conversation or a Text.

A format is one file with a FORMAT in it and one line here. `pkg.module:NAME` names one outside the
tree. `auto` takes the one format that recognises the first readable row.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats.alpaca import FORMAT as ALPACA
from posttrain.data.formats.base import Format
from posttrain.data.formats.fields import FORMAT as FIELDS
from posttrain.data.formats.messages import FORMAT as MESSAGES
from posttrain.data.formats.prompt_completion import FORMAT as PROMPT_COMPLETION
from posttrain.data.formats.sharegpt import FORMAT as SHAREGPT
from posttrain.data.formats.text import FORMAT as TEXT

FORMATS: dict[str, Format] = {
    "messages": MESSAGES,
    "sharegpt": SHAREGPT,
    "alpaca": ALPACA,
    "prompt_completion": PROMPT_COMPLETION,
    "text": TEXT,
    "fields": FIELDS,
}

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


def find_format(row: Any, cfg: SourceConfig, place: str) -> str:
    """The name of the format of a source, from its config or (auto) from one of its rows.

    `place` (file:line) stands in the error. ValueError: no format, or several, recognise the row.
    """
    if cfg.format != "auto":
        get_format(cfg.format)
        if cfg.fields and cfg.format != "fields":
            raise ValueError(
                f"{place}: format: {cfg.format} with fields: only the format `fields` reads them; "
                "remove one of the two"
            )
        return cfg.format
    if cfg.fields:
        return "fields"
    columns = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
    if isinstance(row, Mapping) and {"chosen", "rejected"} <= row.keys():
        raise ValueError(
            f"{place}: preference pairs (columns: {columns}), not a format to imitate; to train on "
            "the chosen side alone, name it: fields: {messages: chosen} or {prompt:, completion:}"
        )
    if isinstance(row, Mapping) and isinstance(row.get("label"), bool):
        raise ValueError(
            f"{place}: answers labelled good or bad (columns: {columns}), not a format to imitate: "
            "leave the bad rows out, then name the format, as in format: messages"
        )
    found = [name for name, known in FORMATS.items() if known.detect(row)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{place}: the columns ({columns}) fit {' and '.join(found)}: "
            f"name one with format: {found[0]}"
        )
    raise ValueError(
        f"{place}: no format recognises the columns ({columns}): map them, for example "
        "fields: {user: question, assistant: answer}, or name a format: " + ", ".join(FORMATS)
    )
