"""Pairs, in TRL's columns: {"prompt", "chosen", "rejected"} or, with an implicit prompt, {"chosen",
"rejected"}; tools, system and chat_template_kwargs may stand beside them.

Three texts make a pair without a template. Lists of messages are templated: `prompt` is a list, or
the text of one user turn; an answer is a list that begins with the assistant, or its text. Where
the two lists begin with the prompt themselves (UltraFeedback binarized, Tulu), `prompt` must agree
with them. Without `prompt`, the messages that both lists begin with are it, and what follows must
be answers. Two texts without a prompt are refused: where they part says nothing about where the
answer begins (TRL cuts them at the first character that differs, which may lie inside a word).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.config import SourceConfig
from posttrain.data.formats.base import Format, Turns, as_object
from posttrain.data.formats.messages import EXTRA, conversation
from posttrain.data.rows import Problem, RowError, show, text_problem, wrong_type
from posttrain.types import Conversation, Pair, Text

COLUMNS = ("prompt", "chosen", "rejected")
Names = tuple[str, str, str]
"""What problems call prompt, chosen and rejected."""
TRANSCRIPT = "\n\nHuman:"
"""What a transcript (the format `hh`) begins with."""


def detect(row: Any) -> bool:
    if not isinstance(row, Mapping):
        return False
    prompt, *answers = (row.get(column) for column in COLUMNS)
    if prompt is None:
        return all(isinstance(answer, (list, tuple)) for answer in answers)
    if isinstance(prompt, str) and prompt.startswith(TRANSCRIPT):
        return False
    return all(isinstance(value, (str, list, tuple)) for value in (prompt, *answers))


def convert(row: Any, cfg: SourceConfig) -> Pair:
    row = as_object(row, (*COLUMNS, *EXTRA))
    return pair(row, row, COLUMNS, cfg)


def pair(
    values: Mapping[str, Any],
    row: Mapping[str, Any],
    names: Names,
    cfg: SourceConfig,
    *,
    templated: bool = False,
) -> Pair:
    """The pair of `values`' prompt, chosen and rejected, in any of the shapes above.

    `row` has system and tools. `templated`: three texts are one user turn and two answers.
    """
    prompt, chosen, rejected = (values.get(column) for column in COLUMNS)
    lists = [isinstance(answer, (list, tuple)) for answer in (chosen, rejected)]
    if isinstance(prompt, str) and not any(lists) and not templated:
        return _texts(prompt, chosen, rejected, row, names)
    if prompt is None and not any(lists):
        fix = "write the prompt, or map its column with fields"
        raise RowError([Problem(names[0], "missing: where the answers begin is not known", fix)])
    problems: list[Problem] = []
    good, bad = _answer(chosen, names[1], problems), _answer(rejected, names[2], problems)
    if isinstance(prompt, str):
        if problem := text_problem(prompt, names[0]):
            problems.append(problem)
    elif prompt is not None and not isinstance(prompt, (list, tuple)):
        problems.append(wrong_type(names[0], prompt, "a text or a list of messages"))
    if problems:
        raise RowError(problems)
    if prompt is None:
        return shared(good, bad, row, names, cfg)
    whole = [bool(s.messages) and _role(s.messages[0]) in ("system", "user") for s in (good, bad)]
    if all(whole):
        return _repeated(prompt, good, bad, row, names, cfg)
    turns = Turns([{"role": "user", "content": prompt}], [names[0]])
    if not isinstance(prompt, str):
        turns = Turns.of(prompt, names[0])
    return join(turns, good, bad, row, names, cfg)


def shared(chosen: Turns, rejected: Turns, row: Any, names: Names, cfg: SourceConfig) -> Pair:
    """The pair of two whole conversations: what both begin with is the prompt. RowError where they
    do not part at an answer."""
    at = _common(chosen, rejected, cfg)
    sides = (chosen, rejected)
    if all(at == len(side.messages) for side in sides):
        found = f"the same as {names[1]}: the pair teaches nothing"
        raise RowError([Problem(names[2], found, "remove the row")])
    problems = []
    for k, (side, name) in enumerate(zip(sides, names[1:], strict=True)):
        other = names[2 - k]
        if at == len(side.messages):
            found = f"the beginning of {other}: no answer is left beside the shared prompt"
            raise RowError([Problem(name, found, f"put the shared turns into {names[0]}")])
        if at == 0:
            found, fix = f"shares no first message with {other}", "both must begin with one prompt"
            problems.append(Problem(side.places[0], found, fix))
        elif (role := _role(side.messages[at])) in ("system", "user", "tool"):
            found = f"the sides part at a message of role {role}, not at an answer"
            problems.append(Problem(side.places[at], found, f"put the prompt into {names[0]}"))
    if problems:
        raise RowError(problems)
    (prompt, good), (_, bad) = chosen.split(at), rejected.split(at)
    return join(prompt, good, bad, row, names, cfg)


def join(
    prompt: Turns, chosen: Turns, rejected: Turns, row: Any, names: Names, cfg: SourceConfig
) -> Pair:
    """The pair of a prompt and two answers, whose messages alone are trained. RowError: what is
    wrong with any of them, or with the three as a pair."""
    context = [
        {**m, "weight": 0.0} if isinstance(m, Mapping) and m.get("role") == "assistant" else m
        for m in prompt.messages
    ]
    problems: dict[Problem, None] = {}
    sides: list[Conversation] = []
    for answer, name in ((chosen, names[1]), (rejected, names[2])):
        places = [*prompt.places, *answer.places]
        try:
            if answer.messages and (role := _role(answer.messages[0])) in ("system", "user"):
                found = f"the answer begins with a message of role {role}"
                fix = f"put it into {names[0]}, or begin with the assistant"
                raise RowError([Problem(answer.places[0], found, fix)])
            turns = [*context, *answer.messages]
            sides.append(conversation(turns, row, f"{names[0]}+{name}", cfg, places))
            problems |= dict.fromkeys(_weights(answer))
        except RowError as error:
            problems |= dict.fromkeys(error.problems)
    last = _role(prompt.messages[-1]) if prompt.messages else "none"
    if not prompt.messages:
        found, fix = "no message before the answers", "write what is answered"
        problems[Problem(names[0], found, fix)] = None
    elif last in ("system", "assistant"):
        found = f"the prompt ends with a message of role {last}, not user or tool"
        problems[Problem(prompt.places[-1], found, "end it with what is answered")] = None
    if not problems and sides[0].messages == sides[1].messages:
        found = f"the same as {names[1]}: the pair teaches nothing"
        problems[Problem(names[2], found, "remove the row")] = None
    if problems:
        raise RowError(problems)
    return Pair(sides[0], sides[1])


def _weights(answer: Turns) -> list[Problem]:
    """Weights that would be lost: losses of pairs count each trained token once."""
    return [
        Problem(
            f"{place}.weight",
            f"{show(message['weight'])} in an answer of a pair",
            "write 0 (not trained) or 1, or remove it: a pair's tokens count alike",
        )
        for message, place in zip(answer.messages, answer.places, strict=True)
        if message.get("weight") not in (None, 0, 1)
    ]


def _texts(prompt: Any, chosen: Any, rejected: Any, row: Any, names: Names) -> Pair:
    """A pair without a template."""
    values = zip(names, (prompt, chosen, rejected), strict=True)
    problems = [problem for name, value in values if (problem := text_problem(value, name))]
    for extra in EXTRA:
        if row.get(extra):
            fix = f"template it: fields: {{user: {names[0]}, chosen: {names[1]}, ...}}"
            found = f"{show(row[extra])} beside plain texts, which have no template to put it in"
            problems.append(Problem(extra, found, fix))
    if not problems and chosen == rejected:
        found = f"the same as {names[1]}: the pair teaches nothing"
        problems.append(Problem(names[2], found, "remove the row"))
    if problems:
        raise RowError(problems)
    return Pair(Text(chosen, prompt), Text(rejected, prompt))


def _answer(answer: Any, name: str, problems: list[Problem]) -> Turns:
    """The messages of an answer given as a list or as its text."""
    if isinstance(answer, (list, tuple)):
        if not answer:
            problems.append(Problem(name, "an empty list", "write the answer, or remove the row"))
        return Turns.of(answer, name)
    if not isinstance(answer, str):
        problems.append(wrong_type(name, answer, "a text or a list of messages"))
        return Turns((), ())
    return text_answer(answer, name, problems)


def text_answer(answer: Any, name: str, problems: list[Problem]) -> Turns:
    """The one message of an answer's text; what is wrong goes to `problems`."""
    if problem := text_problem(answer, name):
        found = problem.found.replace("empty text", "empty answer")
        fix = problem.fix.replace("a text", "an answer").replace("text", "answer")
        problems.append(Problem(name, found, fix))
    return Turns([{"role": "assistant", "content": answer}], [name])


def _repeated(
    prompt: Any, chosen: Turns, rejected: Turns, row: Any, names: Names, cfg: SourceConfig
) -> Pair:
    """A pair whose lists are whole conversations, and whose prompt says again what both have."""
    both = _common(chosen, rejected, cfg)
    if isinstance(prompt, str):
        texts = [m.get("content") for m in chosen.messages[:both] if _role(m) == "user"]
        if any(isinstance(text, str) and text.strip() == prompt.strip() for text in texts):
            return shared(chosen, rejected, row, names, cfg)
    elif _common(chosen, Turns.of(prompt, names[0]), cfg) == len(prompt) <= both:
        (begin, good), (_, bad) = chosen.split(len(prompt)), rejected.split(len(prompt))
        return join(begin, good, bad, row, names, cfg)
    found = f"not what {names[1]} and {names[2]} both begin with"
    fix = f"correct it, or leave it out: fields: {{chosen: {names[1]}, rejected: {names[2]}}}"
    raise RowError([Problem(names[0], found, fix)])


def _common(a: Turns, b: Turns, cfg: SourceConfig) -> int:
    """Messages that both begin with."""
    count = 0
    for x, y in zip(a.messages, b.messages, strict=False):
        if _bare(x, cfg) != _bare(y, cfg):
            break
        count += 1
    return count


def _bare(message: Any, cfg: SourceConfig) -> Any:
    """The message without what counts as absent."""
    if not isinstance(message, Mapping):
        return message
    return {k: v for k, v in message.items() if v is not None and k not in cfg.ignore_keys}


def _role(message: Any) -> str:
    role = message.get("role") if isinstance(message, Mapping) else None
    return role if isinstance(role, str) else ""


FORMAT = Format(detect, convert, kind="pairs")
