"""A chat template with one model's special tokens: text, sources, generation prompts."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import meta

from posttrain.chat.control import Intervals
from posttrain.chat.jinja import ChatEnvironment, compile_template
from posttrain.chat.shapes import Lost, lost_fields, shape_messages, shapes_for
from posttrain.chat.spans import PREFIX, SWITCH, Prompt, Span
from posttrain.chat.steady import Known, Structure, is_steady, structure_of
from posttrain.chat.trace import Trace, TracedEnvironment, wrap_messages, wrap_tools
from posttrain.chat.traced import FIELD, LITERAL, ROLE
from posttrain.types import Conversation

# what a template raises: itself, or through a value it did not expect
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
)
_ROLE = re.compile(r"[a-z_]+")
_STRUCTURES = 256  # remembered; conversations of ever new lengths must not fill the memory
_PROSE = ("content", "reasoning_content", "thinking")


class ChatError(ValueError):
    """A conversation that cannot be trained exactly. reason: why; text: what it rendered to."""

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(f"{reason}\nrendered text:\n{text}" if text else reason)
        self.reason, self.text = reason, text

    def __reduce__(self) -> Any:
        return ChatError, (self.reason, self.text)


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template took it.

    messages: in the shape handed to the template. lost: the fields it dropped. variables: all
    else that the template saw.
    """

    messages: list[dict[str, Any]]
    roles: list[str]
    trace: Trace
    lost: list[Lost]
    variables: Mapping[str, Any]

    def sources(self) -> tuple[Intervals, Intervals]:
        """Character intervals, sorted and disjoint: written by the template; written by an
        assistant as plain prose (not as tool arguments)."""
        trusted: list[tuple[int, int]] = []
        prose: list[tuple[int, int]] = []
        at = 0
        for length, tag in self.trace.runs:
            end = at + length
            into = None
            if tag.kind == LITERAL:
                into = trusted
            elif tag.kind == ROLE:
                into = trusted if _ROLE.fullmatch(self.trace.text, at, end) else None
            elif tag.kind == FIELD and tag.field in _PROSE and not tag.parts:
                into = prose if self.roles[tag.owner] == "assistant" else None
            if into and into[-1][1] == at:
                into[-1] = (into[-1][0], end)
            elif into is not None:
                into.append((at, end))
            at = end
        return trusted, prose


@dataclass(frozen=True)
class Part:
    """One example to be: a rendering, its spans, the weight of each message."""

    rendered: Rendered
    spans: list[Span]
    weights: Mapping[int, float]


class Renderer:
    """Renders conversations. Safe to use from several threads.

    tokens: bos_token and so on, as the template's variables. ValueError where the source is no
    Jinja.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str], kwargs: Mapping[str, Any], date: str
    ) -> None:
        environment = ChatEnvironment(date)
        self._tokens, self._kwargs = dict(tokens), dict(kwargs)
        self._template = compile_template(environment, source)
        self._traced = TracedEnvironment(source, date, tokens)
        self._lock = threading.Lock()
        self.literals = self._traced.texts
        tree = environment.parse(source)
        self._steady = is_steady(tree)
        self._known: dict[tuple[bool, Structure], Known] = {}
        names = sorted(meta.find_undeclared_variables(tree))
        self.switches = [
            {name: value} for name in names if "think" in name for value in (True, False)
        ]

    def render(self, conversation: Conversation, *, prompt: bool = False) -> Rendered:
        """Trace the conversation in the first shape that loses nothing, else in the one that
        loses least. ChatError where the template raises in every shape."""
        tools = list(conversation.tools) or None
        variables = {
            **self._tokens,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": prompt,
            **self._kwargs,
            **conversation.template_kwargs,
        }
        plain = self._steady and not tools and not conversation.template_kwargs
        structure = structure_of(conversation.messages) if plain else None
        key = None if structure is None else (prompt, structure)
        if key in self._known:
            reused = self._refill(self._known[key], conversation, variables)
            if reused is not None:
                return reused
        wrapped_tools = wrap_tools(tools) if tools else None
        best: Rendered | None = None
        problem: Exception | None = None
        for shape in shapes_for(conversation.messages):
            messages = shape_messages(conversation.messages, shape)
            try:
                text = self._template.render({**variables, "messages": messages})
            except _TEMPLATE_ERRORS as error:
                problem = problem or error
                continue
            with self._lock:
                wrapped = wrap_messages(messages, self._traced)
                followed = {**variables, "messages": wrapped, "tools": wrapped_tools}
                try:
                    trace = self._traced.trace(followed)
                except _TEMPLATE_ERRORS as error:
                    raise ChatError(f"the template cannot be followed: {error}", text) from error
            if trace.text != text:
                raise ChatError("the template cannot be followed: its text changed", text)
            lost = lost_fields(trace, wrapped, wrapped_tools)
            if best is None or len(lost) < len(best.lost):
                roles = [str(message.get("role")) for message in messages]
                best = Rendered(messages, roles, trace, lost, variables)
            if not lost:
                if key is not None and len(self._known) < _STRUCTURES:
                    known = Known.of(trace, messages)
                    if known is not None:
                        self._known[key] = known
                break
        if best is None:
            raise ChatError(f"the chat template refuses the conversation: {problem}")
        return best

    def _refill(
        self, known: Known, conversation: Conversation, variables: Mapping[str, Any]
    ) -> Rendered | None:
        """The rendering by the trace of another conversation of the same structure."""
        messages = shape_messages(conversation.messages, shapes_for(conversation.messages)[0])
        trace = known.fill(messages, self._template.render({**variables, "messages": messages}))
        if trace is None:
            return None
        roles = [message["role"] for message in messages]
        return Rendered(messages, roles, trace, [], variables)

    def prompts(self, part: Rendered, index: int) -> list[Prompt]:
        """What the model would be asked with at message `index`: the rendering of what comes
        before it that is a prefix of the text, else all that can be rendered."""
        out = []
        history = part.messages[:index]
        for switch in ({}, *self.switches):
            how = SWITCH if switch else PREFIX
            asked = {**part.variables, **switch, "add_generation_prompt": True}
            closed = {**asked, "add_generation_prompt": False}
            try:
                text = self._template.render({**asked, "messages": history})
                if part.trace.text.startswith(text):
                    return [Prompt(text, None, how)]
                out.append(
                    Prompt(text, self._template.render({**closed, "messages": history}), how)
                )
            except _TEMPLATE_ERRORS:
                continue
        return out
