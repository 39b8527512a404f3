"""Plain text: {"text"}, trained from its first token to the EOS. A .txt file is one such row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats.base import Format, as_object
from posttrain.data.rows import RowError, text_problem
from posttrain.types import Text


def detect(row: Any) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("text"), str)


def convert(row: Any, cfg: SourceConfig) -> Text:
    row = as_object(row, ("text",))
    if problem := text_problem(row.get("text"), "text"):
        raise RowError([problem])
    return Text(completion=row["text"])


FORMAT = Format(detect, convert)
