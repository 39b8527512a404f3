"""A stand-in for ChatTemplate that anyone can work out by hand: a byte is a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from posttrain.chat.config import ChatConfig
from posttrain.types import Conversation, Example, Text

BOS, END = 256, 257


@dataclass(frozen=True)
class FakeTokenizer:
    bos_id: int = BOS


@dataclass(frozen=True)
class FakeChat:
    """BOS, then each message's bytes and END; the assistant's are trained with its weight."""

    name: str = "fake"
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    cfg: ChatConfig = field(default_factory=ChatConfig)

    def examples(self, conversation: Conversation) -> list[Example]:
        tokens, weights = [BOS], [0.0]
        for message in conversation.messages:
            if "refuse me" in message["content"]:
                raise ValueError("the template refuses this")
            new = [*message["content"].encode(), END]
            weight = message.get("weight", 1.0) if message["role"] == "assistant" else 0.0
            tokens += new
            weights += [weight] * len(new)
        return [Example(np.array(tokens, np.int32), np.array(weights, np.float32))]

    def examples_batch(self, conversations: Sequence[Conversation]):
        made = []
        for conversation in conversations:
            try:
                made.append(self.examples(conversation))
            except ValueError as error:
                made.append(error)
        return made

    def text_example(self, text: Text) -> Example:
        prompt, completion = [BOS, *text.prompt.encode()], [*text.completion.encode(), END]
        weights = [0.0] * len(prompt) + [1.0] * len(completion)
        return Example(np.array(prompt + completion, np.int32), np.array(weights, np.float32))

    def fingerprint(self) -> str:
        return self.name

    def check(self) -> list[str]:
        return []
