"""Anthropic's transcripts: {"chosen", "rejected"}, each "\\n\\nHuman: ...\\n\\nAssistant: ...";
or with a `prompt` that ends in "\\n\\nAssistant:" and answers that go on from there.

A turn begins where a speaker's name follows an empty line; white space around its text is not part
of it. The turns that both sides begin with are the prompt. Two turns of one speaker in a row stay
two messages. Problems are named by turn: chosen[0] is the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats.base import Format, Turns, as_object
from posttrain.data.formats.messages import EXTRA
from posttrain.data.formats.preference import COLUMNS, TRANSCRIPT, Names, shared
from posttrain.data.rows import Problem, RowError, show, text_problem
from posttrain.types import Pair

SPEAKER = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def detect(row: Any) -> bool:
    if not isinstance(row, Mapping):
        return False
    prompt, *answers = (row.get(column) for column in COLUMNS)
    if not all(isinstance(answer, str) for answer in answers):
        return False
    begins = answers if prompt is None else [prompt]
    return all(isinstance(text, str) and text.startswith(TRANSCRIPT) for text in begins)


def convert(row: Any, cfg: SourceConfig) -> Pair:
    row = as_object(row, (*COLUMNS, *EXTRA))
    return pair(row, row, COLUMNS, cfg)


def pair(
    values: Mapping[str, Any], row: Mapping[str, Any], names: Names, cfg: SourceConfig
) -> Pair:
    """The pair of `values`' transcripts; `row` has system and tools."""
    problems: list[Problem] = []
    prompt = values.get("prompt") or ""
    for column, name in zip(COLUMNS, names, strict=True):
        asked = column != "prompt" or prompt
        if asked and (problem := text_problem(values.get(column), name)):
            problems.append(problem)
    if problems:
        raise RowError(problems)
    sides: list[Turns] = []
    for column, name in zip(COLUMNS[1:], names[1:], strict=True):
        before, *turns = SPEAKER.split(prompt + values[column])
        if before.strip() or not turns:
            where, text = (names[0], prompt) if prompt else (name, values[column])
            found = f"begins with {show(text)}"
            problems.append(Problem(where, found, 'begin with "\\n\\nHuman: "'))
        speakers, texts = turns[::2], turns[1::2]
        messages = [
            {"role": ROLES[speaker], "content": text.strip()}
            for speaker, text in zip(speakers, texts, strict=True)
        ]
        sides.append(Turns.of(messages, name))
    if problems:
        raise RowError(list(dict.fromkeys(problems)))
    chosen, rejected = sides
    return shared(chosen, rejected, row, names, cfg)


FORMAT = Format(detect, convert, kind="pairs")
