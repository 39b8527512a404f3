"""Asking a language model for its judgement, until it ends as it was told to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

from posttrain.config import Config, semantic
from posttrain.openai_client import Client, EndpointConfig
from posttrain.rewards.base import expected
from posttrain.types import Message, Rollout


class Asking(Config):
    """How a judge is asked."""

    temperature: float = semantic(0.0, ge=0, help="of the judge's own sampling")
    max_tokens: int = semantic(1024, gt=0, help="most tokens of what it says")
    attempts: int = semantic(3, gt=0, help="how often it is asked until it ends as it was told to")
    unreadable: Literal["error", "none"] = semantic(
        "error", help="where it never does: end the run, or the part does not apply"
    )
    instructions: str = semantic(
        "", help="said to it first, as a system prompt: what counts here; empty: nothing"
    )


@cache
def _client(endpoint: str) -> Client:
    """One for all threads, so that no more requests are under way than it allows."""
    return Client(EndpointConfig.model_validate_json(endpoint))


def ask(
    endpoint: EndpointConfig, asking: Asking, text: str, read: Callable[[str], float | None]
) -> float | None:
    """What is read in the judge's answer. ValueError: it never can be, and that is an error."""
    system = [{"role": "system", "content": asking.instructions}] if asking.instructions else []
    messages = [*system, {"role": "user", "content": text}]
    options: dict[str, Any] = {
        "temperature": asking.temperature,
        "max_tokens": asking.max_tokens,
    }
    client, said = _client(endpoint.model_dump_json()), ""
    for attempt in range(asking.attempts):
        again = {"seed": attempt} if attempt else {}  # another question, to a cache as well
        said = _said(client.chat(messages, **options, **again))
        value = read(said)
        if value is not None:
            return value
    if asking.unreadable == "none":
        return None
    raise ValueError(
        f"the judge was asked {asking.attempts} times and gave no verdict; it ended {said[-200:]!r}"
    )


def _said(answer: Mapping[str, Any]) -> str:
    try:
        return answer["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the server's answer has no choice: {str(answer)[:200]}") from error


def question_of(messages: Sequence[Message]) -> str:
    """What was asked, as one text: the message, or several with their roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def reference_of(rollout: Rollout, key: str) -> str:
    """The prompt's answer in tags, "" where there is none."""
    found = expected(rollout, key)
    return "" if found is None else f"\n<right_answer>\n{found}\n</right_answer>\n"


def filled(template: str, **texts: str) -> str:
    """The template with texts for {names}, in one pass: what is put in is not searched again."""
    return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), template)


def must_have(template: str, *names: str) -> None:
    """ValueError: one of the names does not stand in the template."""
    if missing := [name for name in names if name not in template]:
        raise ValueError(f"template: {', '.join(missing)} must stand in it")
