"""A user's own problems: rows with columns of any name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import field_validator

from posttrain.config import did_you_mean, semantic
from posttrain.data.formats.fields import value_of
from posttrain.data.rows import Problem, RowError, text_problem
from posttrain.tasks.base import Question
from posttrain.tasks.files import FileTask, asked

PARTS = ("question", "messages", "answer", "system", "tools", "id")


class JSONL(FileTask):
    """Rows of any columns, named by `fields`. Prompt.answer: whatever the column holds.

    It has no rewards of its own: a run names them.
    """

    name = "jsonl"

    fields: dict[str, str] = semantic(
        {"question": "question", "answer": "answer"},
        help="own columns: question (a text) or messages (a list, the last of which asks), and "
        "answer, system, tools, id; a value is a column, a dotted path into it, or a text with "
        "{column} in it",
    )

    @field_validator("fields")
    @classmethod
    def _known(cls, fields: dict[str, str]) -> dict[str, str]:
        for part in fields:
            if part not in PARTS:
                hint = did_you_mean(part, PARTS) or f"; known: {', '.join(PARTS)}"
                raise ValueError(f"unknown part {part!r}{hint}")
        if "question" in fields and "messages" in fields:
            raise ValueError("name one of question and messages: it is what is asked")
        return fields if "messages" in fields else {"question": "question", **fields}

    def read(self, row: Mapping[str, Any]) -> Question:
        problems: list[Problem] = []
        values = {part: value_of(row, path, problems) for part, path in self.fields.items()}
        if problems:
            raise RowError(problems)
        system, name = values.get("system"), values.get("id", "")
        if isinstance(name, int):
            name = str(name)
        for part, optional in (("system", system), ("id", name)):
            if optional and (found := text_problem(optional, self.fields[part])):
                problems.append(found)
        if problems:
            raise RowError(problems)
        question = values.get("question")
        if "question" in values and (found := text_problem(question, self.fields["question"])):
            raise RowError([found])
        said = [{"role": "user", "content": question}] if question else values["messages"]
        made = asked(said, self.fields.get("messages", "question"), values.get("tools"))
        messages = made.messages
        if system and (not messages or messages[0]["role"] != "system"):
            messages = ({"role": "system", "content": system}, *messages)
        return replace(made, answer=values.get("answer"), messages=messages, id=name)
