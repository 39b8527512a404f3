"""OpenAI-style chat: {"messages": [{"role", "content", ...}], "tools"?, "system"?}.

`content` is a string or a list of text parts; `tool_calls` have arguments as an object or as JSON
text; `reasoning_content` (or reasoning, thinking) is the thinking; `weight` trains a message more
or less. The column may also be called conversations or conversation.
"""

from __future__ import annotations

from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats.base import Format, as_object, items_have
from posttrain.data.normal import normalise
from posttrain.types import Conversation

COLUMNS = ("messages", "conversations", "conversation")
EXTRA = ("tools", "system", "chat_template_kwargs")


def detect(row: Any) -> bool:
    return items_have(row, COLUMNS, ("role",)) is not None


def convert(row: Any, cfg: SourceConfig) -> Conversation:
    row = as_object(row, (*COLUMNS, *EXTRA))
    column = next((c for c in COLUMNS if row.get(c) is not None), COLUMNS[0])
    return conversation(row.get(column), row, column, cfg)


def conversation(
    messages: Any, row: Any, column: str, cfg: SourceConfig, places: list[str] | None = None
) -> Conversation:
    """The messages with the row's system text before them and its tools beside them."""
    if row.get("system") not in (None, "") and isinstance(messages, (list, tuple)):
        places = ["system", *(places or [f"{column}[{i}]" for i in range(len(messages))])]
        messages = [{"role": "system", "content": row["system"]}, *messages]
    return normalise(
        messages,
        where=column,
        places=places,
        tools=row.get("tools"),
        template_kwargs=row.get("chat_template_kwargs"),
        ignore_keys=cfg.ignore_keys,
    )


FORMAT = Format(detect, convert)
