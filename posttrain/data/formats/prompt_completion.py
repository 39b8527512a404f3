"""{"prompt", "completion"}: two texts (no template), or two lists of messages (templated).

Of a conversation, only the completion's messages are trained: the prompt's get weight 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats.base import Format, as_object
from posttrain.data.formats.messages import EXTRA, conversation
from posttrain.data.rows import Problem, RowError, text_problem, wrong_type
from posttrain.types import Sample, Text

COLUMNS = ("prompt", "completion")


def detect(row: Any) -> bool:
    return isinstance(row, Mapping) and all(
        isinstance(row.get(c), (str, list, tuple)) for c in COLUMNS
    )


def convert(row: Any, cfg: SourceConfig) -> Sample:
    row = as_object(row, (*COLUMNS, *EXTRA))
    return join(row.get("prompt"), row.get("completion"), row, COLUMNS, cfg)


def join(
    prompt: Any, completion: Any, row: Any, names: tuple[str, str], cfg: SourceConfig
) -> Sample:
    """The sample of a prompt and a completion; `names` are their columns, for what is wrong."""
    if isinstance(prompt, (list, tuple)) or isinstance(completion, (list, tuple)):
        problems = [
            wrong_type(name, value, "a list of messages, as the other is")
            for name, value in zip(names, (prompt, completion), strict=True)
            if not isinstance(value, (list, tuple))
        ]
        if not completion and not problems:
            problems.append(Problem(names[1], "an empty list", "write the answer"))
        if problems:
            raise RowError(problems)
        context = [
            {**m, "weight": 0.0} if isinstance(m, Mapping) and m.get("role") == "assistant" else m
            for m in prompt
        ]
        places = [f"{names[0]}[{i}]" for i in range(len(context))]
        places += [f"{names[1]}[{i}]" for i in range(len(completion))]
        return conversation([*context, *completion], row, "+".join(names), cfg, places)
    problems = [
        problem
        for name, value, empty in ((names[0], prompt, True), (names[1], completion, False))
        if (problem := text_problem(value, name, may_be_empty=empty))
    ]
    if problems:
        raise RowError(problems)
    return Text(completion=completion, prompt=prompt)


FORMAT = Format(detect, convert)
