"""Conversations and tokenizers that the tests of chat/ share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.chat.template import ChatConfig, ChatTemplate
from posttrain.chat.tokenizer import Tokenizer
from posttrain.types import Conversation, Example

CONTROL = re.compile(
    r"<\|[^|<>\s]+\|>|<\uff5c[^\uff5c<>]+\uff5c>|<(?:start|end)_of_turn>|\[/?[A-Z_]{3,}\]"
    r"|<end_of_utterance>|<\|?(?:turn|tool_call|tool_response|channel)\|?>|\[\|[a-z]+\|\]"
)
CONTROL_OF_PHI = ("<|user|>", "<|assistant|>", "<|system|>")

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather & more",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The <city>"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Paris <x>", "days": 3}},
}


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content, **more}


PLAIN = Conversation((say("user", "Hi <b>there"), say("assistant", "Hello & co")))
SYSTEM = Conversation(
    (
        say("system", "Be nice."),
        say("user", "Question one"),
        say("assistant", "Answer A"),
        say("user", "Question two"),
        say("assistant", "Answer B"),
        say("user", "Question three"),
        say("assistant", "Answer C"),
    )
)
THINK = Conversation(
    (
        say("user", "Question one"),
        say("assistant", "Answer A", reasoning_content="hmm one"),
        say("user", "Question two"),
        say("assistant", "Answer B", reasoning_content="hmm two"),
    )
)
TOOLS = Conversation(
    (
        say("user", "Weather?"),
        say("assistant", "", tool_calls=[CALL]),
        say("tool", '{"t": 21}', name="get_weather", tool_call_id="abcdefghi"),
        say("assistant", "It is 21."),
    ),
    (TOOL,),
)


def byte_tokenizer(data_dir: Path, tokens: tuple[str, ...] = (), eos: str = "</s>") -> Tokenizer:
    """The small byte-level tokenizer with more control tokens; byte-level BPE decodes exactly."""
    text = (data_dir / "data/tokenizers/minimind/tokenizer.json").read_text(encoding="utf-8")
    plain = Tokenizer(text, {"bos_token": "<s>", "eos_token": eos})
    return plain.with_added_tokens(["<s>", "</s>", *tokens])


def template_of(data_dir: Path, source: str, **cfg: Any) -> ChatTemplate:
    """A template with a tokenizer that knows its control tokens."""
    tokens = (*sorted(set(CONTROL.findall(source))), *CONTROL_OF_PHI)
    return ChatTemplate(source, byte_tokenizer(data_dir, tokens), ChatConfig(**cfg))


def trained(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The text of each stretch of trained tokens."""
    on = np.concatenate([[False], example.loss_weights > 0, [False]])
    edges = np.flatnonzero(on[1:] != on[:-1]).reshape(-1, 2)
    return [tokenizer.decode(example.tokens[low:high].tolist()) for low, high in edges]


CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '
' + m['content'] + '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
