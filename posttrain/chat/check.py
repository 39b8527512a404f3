"""What can be learnt of a template by trying it on small conversations."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from posttrain.chat.encoding import Encoding, token_range
from posttrain.chat.render import ChatError, Part, Rendered, Renderer
from posttrain.chat.spans import MARKED, SWITCH, TURN, Span, SpanFinder
from posttrain.chat.tokenizer import Tokenizer
from posttrain.types import Conversation, Message

_CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<\uff5c[^\uff5c<>]+\uff5c>|<(?:start|end)_of_turn>")

_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word."}},
            "required": ["word"],
        },
    },
}
_CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "look_up", "arguments": {"word": "quince"}},
}


def _say(role: str, text: str, **more: object) -> Message:
    return {"role": role, "content": text, **more}


_PLAIN = (_say("user", "First question."), _say("assistant", "First answer."))
_TRIALS: dict[str, Conversation] = {
    "plain": Conversation(_PLAIN),
    "several turns": Conversation(
        (*_PLAIN, _say("user", "Second question."), _say("assistant", "Second answer."))
    ),
    "system": Conversation((_say("system", "Be brief."), *_PLAIN)),
    "thinking": Conversation(
        (
            _PLAIN[0],
            _say("assistant", "First answer.", reasoning_content="First thought."),
            _say("user", "Second question."),
            _say("assistant", "Second answer.", reasoning_content="Second thought."),
        )
    ),
    "tool": Conversation(
        (
            _PLAIN[0],
            _say("assistant", "", tool_calls=[_CALL]),
            _say("tool", "A fruit.", name="look_up", tool_call_id="abcdef123"),
            _say("assistant", "First answer."),
        ),
        (_TOOL,),
    ),
}


def learn_stops(renderer: Renderer, known: Collection[str], specials: Sequence[str]) -> list[str]:
    """The stop token that a template puts after a turn in the middle of a conversation, where it
    is none of the known ones: the only special token there. [] where that is not clear."""
    tried = [_TRIALS["several turns"], _TRIALS["plain"]]
    # some templates want tools, come what may
    tried += [Conversation(conversation.messages, (_TOOL,)) for conversation in tried]
    for conversation in tried:
        try:
            part = renderer.render(conversation)
        except ChatError:
            continue
        finder = SpanFinder(part.trace, part.roles, known)
        if part.trace.blocks:
            ends = [text for text in specials if _ends_block(part, text)]
            return [] if any(_ends_block(part, stop) for stop in known) else ends[:1]
        tail = finder.tail_text(1)
        found = [token for token in specials if token in tail]
        return found if len(found) == 1 and not any(stop in tail for stop in known) else []
    return []


def _ends_block(part: Rendered, token: str) -> bool:
    at, end = 0, None
    for length, tag in part.trace.runs:
        at += length
        end = at if tag.block == 1 else end
    return end is not None and part.trace.text[:end].rstrip().endswith(token)


def check_template(
    renderer: Renderer,
    tokenizer: Tokenizer,
    parts: Callable[[Conversation], list[Part]],
    encode: Callable[[Rendered], Encoding],
) -> list[str]:
    """Warnings, one line each: what is refused and why, where training and generation disagree.

    parts, encode: those of the ChatTemplate with this renderer and tokenizer.
    """
    out: list[str] = []
    for name, conversation in _TRIALS.items():
        try:
            for part in parts(conversation):
                out += [
                    f"{name} conversations: {line}"
                    for line in _check_part(renderer, tokenizer, part, encode(part.rendered))
                ]
        except ChatError as error:
            out.append(f"{name} conversations are refused: {error.reason}")
    general = [*tokenizer.warnings(), *_check_vocabulary(renderer, tokenizer)]
    return [*general, *dict.fromkeys(out)]


def _check_part(
    renderer: Renderer, tokenizer: Tokenizer, part: Part, encoding: Encoding
) -> list[str]:
    text, out = part.rendered.trace.text, []
    for span in part.spans:
        at = f"message {span.message}: "
        prompts = renderer.prompts(part.rendered, span.message)
        prefix = next((p.text for p in prompts if text.startswith(p.text)), None)
        if span.how == MARKED:
            if not span.stop:
                out.append(f"{at}the {{% generation %}} block ends with no stop token")
            if prefix is not None and len(prefix) != span.start:
                out.append(
                    f"{at}the {{% generation %}} block begins with {text[span.start :][:20]!r}, "
                    f"generation with {text[len(prefix) :][:20]!r}"
                )
        if span.how == SWITCH:
            out.append(f"{at}trained as after the generation prompt of another thinking mode")
        if prefix is None or span.how == TURN:
            out.append(
                f"{at}the rendering with the generation prompt is no prefix of the training text; "
                f"trained from {text[span.start :][:20]!r} on"
            )
        else:
            out += [at + line for line in _check_tokens(tokenizer, prefix, span, encoding)]
    return out


def _check_tokens(tokenizer: Tokenizer, prefix: str, span: Span, encoding: Encoding) -> list[str]:
    """Whether the generation prompt's tokens open the training tokens."""
    asked = tokenizer.encode(prefix).ids
    if encoding.ids[: len(asked)] == asked:
        return []
    low, _ = token_range(encoding, span.start, span.end)
    trained = "".join(tokenizer.token(i) for i in encoding.ids[max(0, low - 1) : low + 1])
    return [
        "the tokens of the generation prompt are no prefix of the training tokens: it ends with "
        f"{tokenizer.token(asked[-1])!r}, where training has {trained!r}"
    ]


def _check_vocabulary(renderer: Renderer, tokenizer: Tokenizer) -> list[str]:
    out = []
    for token in dict.fromkeys(_CONTROL.findall(" ".join(renderer.literals))):
        if token not in tokenizer.added_tokens:
            out.append(f"the template writes {token!r}, which is no token of the tokenizer")
    bos = tokenizer.bos_token
    if bos is None:
        return out
    try:
        text = renderer.render(_TRIALS["plain"]).trace.text
    except ChatError:
        return out
    if text.startswith(bos * 2):
        out.append(f"the template writes BOS ({bos!r}) twice")
    elif tokenizer.adds_bos and not text.startswith(bos):
        out.append(f"the tokenizer begins a text with BOS ({bos!r}), the template does not")
    return out
