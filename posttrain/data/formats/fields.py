"""Any row, by a mapping in the config: `fields: {user: question, assistant: answer}`.

The parts are system, user, reasoning, assistant (a conversation of one turn); text; prompt and
completion; or messages and tools (in OpenAI's or ShareGPT's shape, under other names). Of pairs:
chosen and rejected, with user (a text), with prompt (in any shape of the format `preference`; texts
are templated where system or tools are named too) or alone (lists or transcripts that begin with
the prompt); system and tools beside them. Of labelled answers: label (true or false) beside the
parts of a sample, of which the last message is what is judged. A value is a column, a dotted path
into one
(`data.question`, `answers.0`), or a text with columns in braces
(`"{question}\\nAnswer in one word."`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats import (
    hh,
    labelled,
    messages,
    preference,
    prompt_completion,
    sharegpt,
)
from posttrain.data.formats.base import Format
from posttrain.data.rows import SIDES, Problem, RowError, text_problem, wrong_type
from posttrain.types import Conversation, Labelled, Pair, Sample, Text

TURN = ("system", "user", "reasoning", "assistant")
# each set of parts that makes a sample: the parts it must have, the parts it may have
SHAPES = (
    ({"user", "assistant"}, set(TURN)),
    ({"text"}, {"text"}),
    ({"prompt", "completion"}, {"prompt", "completion", "system", "tools"}),
    ({"messages"}, {"messages", "system", "tools"}),
    ({"user", *SIDES}, {"user", *SIDES, "system", "tools"}),
    ({*SIDES}, {"prompt", *SIDES, "system", "tools"}),
)
_BRACES = re.compile(r"\{([^{}]+)\}")
_ABSENT = object()


def detect(row: Any) -> bool:
    return False  # only the config can ask for it


def kind_of(cfg: SourceConfig) -> str:
    """What the config's fields make: samples, pairs or labelled."""
    parts = cfg.fields.keys()
    return "labelled" if "label" in parts else "pairs" if {*SIDES} <= parts else "samples"


def convert(row: Any, cfg: SourceConfig) -> Sample | Pair | Labelled:
    parts = set(cfg.fields) - {"label"}
    if not any(needed <= parts <= allowed for needed, allowed in SHAPES):
        raise ValueError(
            f"fields: {{{', '.join(sorted(parts))}}} makes no sample: name user and assistant "
            "(system, reasoning beside them), text, prompt and completion, messages (tools), or "
            "for pairs user, chosen and rejected (system, tools); label beside a sample's"
        )
    if not isinstance(row, Mapping):
        raise RowError([wrong_type("row", row, "an object")])
    problems: list[Problem] = []
    values = {part: value_of(row, path, problems) for part, path in cfg.fields.items()}
    if problems:
        raise RowError(problems)
    if kind_of(cfg) == "labelled":
        return _labelled(values, cfg)
    return _unlabelled(values, cfg)


def _labelled(values: dict[str, Any], cfg: SourceConfig) -> Labelled:
    label = values.pop("label")
    if not isinstance(label, bool):
        wanted = "true (desirable) or false"
        raise RowError([wrong_type(cfg.fields["label"], label, wanted)])
    sample = _unlabelled(values, cfg)
    if isinstance(sample, Pair):
        raise ValueError("fields: a label beside chosen and rejected: remove one of the two")
    judged = sample if "completion" in values else labelled.last_answer(sample)
    if problems := labelled.lost_weights(judged):
        raise RowError(problems)
    return Labelled(judged, label)


def _unlabelled(values: Mapping[str, Any], cfg: SourceConfig) -> Sample | Pair:
    if "text" in values:
        if problem := text_problem(values["text"], cfg.fields["text"]):
            raise RowError([problem])
        return Text(completion=values["text"])
    if "completion" in values:
        names = (cfg.fields["prompt"], cfg.fields["completion"])
        return prompt_completion.join(values["prompt"], values["completion"], values, names, cfg)
    if "messages" in values:
        inner = sharegpt if sharegpt.detect(values) else messages
        return inner.convert(values, cfg)
    if "chosen" in values:
        return _pair(values, cfg)
    return _turn(values, cfg)


def _pair(values: Mapping[str, Any], cfg: SourceConfig) -> Pair:
    prompt = "user" if "user" in values else "prompt"
    chosen, rejected = (cfg.fields[side] for side in SIDES)
    names = (cfg.fields.get(prompt, prompt), chosen, rejected)
    given = {"prompt": values.get(prompt), **{side: values[side] for side in SIDES}}
    if prompt == "user" and (problem := text_problem(given["prompt"], names[0])):
        raise RowError([problem])
    if hh.detect(given):
        return hh.pair(given, values, names, cfg)
    templated = bool({"user", "system", "tools"} & values.keys())
    return preference.pair(given, values, names, cfg, templated=templated)


def _turn(values: Mapping[str, Any], cfg: SourceConfig) -> Conversation:
    """One system?, user, assistant conversation; what is wrong is named by the row's columns."""
    problems = [
        problem
        for part in TURN
        if part in values
        and not (part in ("system", "reasoning") and values[part] in (None, ""))
        and (problem := text_problem(values[part], cfg.fields[part]))
    ]
    if problems:
        raise RowError(problems)
    answer = {"role": "assistant", "content": values["assistant"]}
    if values.get("reasoning"):
        answer["reasoning_content"] = values["reasoning"]
    turn = [{"role": "user", "content": values["user"]}, answer]
    if values.get("system"):
        turn.insert(0, {"role": "system", "content": values["system"]})
    return Conversation(tuple(turn))


def value_of(row: Mapping[str, Any], path: str, problems: list[Problem]) -> Any:
    """The column, the inner value of a dotted path, or the text with its braces filled in."""
    if "{" not in path:
        return _column(row, path, problems)

    def fill(match: re.Match[str]) -> str:
        value = _column(row, match.group(1), problems)
        if value is not None and not isinstance(value, (str, int, float)):
            problems.append(wrong_type(match.group(1), value, "a text or a number"))
        return str(value)

    return _BRACES.sub(fill, path)


def _column(row: Mapping[str, Any], path: str, problems: list[Problem]) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step, _ABSENT)
        elif isinstance(value, (list, tuple)) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            value = _ABSENT
        if value is _ABSENT:
            columns = ", ".join(map(str, row)) or "none"
            found = f"missing field (the row has {columns})"
            problems.append(Problem(path, found, "add it, or correct `fields` in the config"))
            return None
    return value


FORMAT = Format(detect, convert, kind=None)
