"""What a template writes between an assistant's turn and the next generation prompt.

A conversation in which a model calls tools grows by appending: the ids that were sampled stay as
they are, and behind them come the ids of what the template puts there. Sampled text is never
tokenised again: another cut into tokens would be text that the model did not write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.chat.render import ChatError, Rendered
from posttrain.chat.spans import MARKED
from posttrain.chat.template import ChatTemplate
from posttrain.types import Conversation, Message

_OPENS_THINKING = re.compile(r"(<think>|<thinking>|<reasoning>|\[THINK\])\s*$")


def follow_up(
    chat: ChatTemplate, conversation: Conversation, turn: int, *, stopped: bool = True
) -> list[int]:
    """The ids from the end of message `turn`, an assistant's, to the end of the generation prompt
    that follows the conversation's last message.

    stopped: the turn was sampled with its stop token; otherwise the ids begin with the template's.
    ChatError where the template refuses the conversation, drops one of the messages that follow, or
    writes no stop token after the turn.
    """
    part = chat.renderer.render(conversation, prompt=True)
    cut, stop = _end_of_turn(chat, part, turn)
    for lost in part.lost:
        if lost.message <= turn:
            continue
        said = str(conversation.messages[lost.message].get(lost.field, "")).strip()
        # a number that the template writes as a number, not as the text it came as, is there, too
        if not said or said not in part.trace.text[cut:]:
            raise ChatError(
                f"the template drops the {lost.field} of a {part.roles[lost.message]} message that "
                "follows a call",
                part.trace.text,
            )
    # the stop token goes along: what stands behind it may be cut another way at the head of a text
    start = cut - len(stop)
    trusted, prose = (
        tuple((max(low - start, 0), high - start) for low, high in intervals if high > start)
        for intervals in part.sources()
    )
    try:
        ids = chat.tokenizer.encode(part.trace.text[start:], trusted=trusted, prose=prose).ids
    except ValueError as error:
        raise ChatError(str(error), part.trace.text) from error
    if ids[:1] != [chat.tokenizer.token_id(stop)]:
        raise ChatError(f"the tokenizer does not keep {stop!r} as one token", part.trace.text)
    return ids[1:] if stopped else ids


def _end_of_turn(chat: ChatTemplate, part: Rendered, turn: int) -> tuple[int, str]:
    """Where the stop token of a turn ends in the text, and that token."""
    (span,) = chat.spans(part, [turn])
    if not span.stop:
        raise ChatError(f"no stop token ends message {turn}", part.trace.text)
    if span.how != MARKED:
        return span.end, span.stop
    return part.trace.text.rindex(span.stop, span.start, span.end) + len(span.stop), span.stop


def refuse_changing_history(
    chat: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    **kwargs: Any,
) -> None:
    """Raises ChatError unless a call and its result can be appended to what was sampled.

    messages: a prompt; tools: what it offers, at least one. Tried with two calls and results in a
    row: each time the text must go on from the earlier one, which stays as it was.
    """

    def render(extra: Sequence[Message], *, prompt: bool) -> Rendered:
        return chat.renderer.render(
            Conversation((*messages, *extra), tuple(tools), kwargs), prompt=prompt
        )

    name = tools[0].get("function", tools[0])["name"]
    first, second = _trial(name, "First result.", 0), _trial(name, "Second result.", 1)
    so_far: list[Message] = []
    for step in (first, second):
        # either rendering will do: some close a turn in another way than they open the next one
        earlier = [render(so_far, prompt=prompt).trace.text for prompt in (True, False)]
        turn = len(messages) + len(so_far)
        so_far += step
        follow_up(chat, Conversation((*messages, *so_far), tuple(tools), kwargs), turn)
        text = render(so_far, prompt=False).trace.text
        if not any(text.startswith(before) for before in earlier):
            raise ChatError(
                "the template changes what came before when a tool has answered, so that ids that "
                f"were sampled would stand behind another text: {_difference(earlier[1], text)}"
            )
    call, result = first
    thinking = render([{**call, "reasoning_content": "First thought."}, result], prompt=False)
    if not any(lost.field == "reasoning_content" for lost in thinking.lost):
        return
    last: Message = {"role": "assistant", "content": "An answer.", "reasoning_content": "Thought."}
    at_last = render([last], prompt=False)
    kept_at_last = not any(lost.field == "reasoning_content" for lost in at_last.lost)
    if kept_at_last or _OPENS_THINKING.search(render([], prompt=True).trace.text):
        raise ChatError(
            "the template drops the thinking of a turn once a tool has answered: what was sampled "
            "after it would have been sampled after another text when the model is used. Choose a "
            "template that keeps it, or one without thinking"
        )


def _trial(name: str, answer: str, index: int) -> list[Message]:
    call_id = f"call{index:05d}"
    function = {"name": name, "arguments": {"argument": "value"}}
    call = {"id": call_id, "type": "function", "function": function}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": answer, "name": name, "tool_call_id": call_id},
    ]


def _difference(before: str, after: str) -> str:
    """Where two texts part, with a few characters of each."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
        min(len(before), len(after)),
    )
    return f"{before[same:][:40]!r} becomes {after[same:][:40]!r}"
