"""An engine that says what it is told to, and what the tests of conversations share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain.chat.config import ChatConfig
from posttrain.chat.template import ChatTemplate
from posttrain.sampling.request import Completion, OnDone, Request, Sampling
from posttrain.tools.calculator import Calculator
from posttrain.types import Conversation, Prompt
from tests.chat.samples import CONTROL, byte_tokenizer, say

CALCULATOR = Calculator().tool()
TOOLS = {"calculator": CALCULATOR}
SAMPLING = Sampling(max_new_tokens=200)


class Scripted:
    """answer(request, which) -> the ids that are sampled. Log-probs are -1, -2, ... from the first
    sampled token of each turn on; plain ones a tenth of that."""

    def __init__(self, answer: Callable[[Request, int], Sequence[int]]) -> None:
        self.answer = answer
        self.asked: list[tuple[int, int, Request]] = []
        self.calls = 0

    def generate(
        self, requests: Sequence[Request], on_done: OnDone | None = None
    ) -> list[list[Completion]]:
        self.calls += 1
        out: list[list[Completion]] = [[] for _ in requests]
        for index, first in enumerate(requests):
            for which in range(first.n):
                request: Request | None = first
                completion = None
                while request is not None:
                    self.asked.append((index, which, request))
                    completion = self._complete(request, which)
                    request = on_done(index, which, completion) if on_done else None
                assert completion is not None
                out[index].append(completion)
        return out

    def _complete(self, request: Request, which: int) -> Completion:
        ids = list(self.answer(request, which))
        stopped = bool(ids) and ids[-1] in request.stop_ids
        ids = ids[: request.sampling.max_new_tokens]
        stopped = stopped and ids[-1] in request.stop_ids
        logps = [-1.0 - i for i in range(len(ids))]
        plain = [x / 10 for x in logps]
        return Completion(ids, logps, plain, "stop" if stopped else "length")

    def update(self, params: Any) -> None:
        raise AssertionError("nobody has weights to give here")


def template(data_dir: Path, source: str, **cfg: Any) -> ChatTemplate:
    control = {*CONTROL.findall(source), "<|eot_id|>"}
    ends = ("<|im_end|>", "<|eot_id|>", "</s>")
    eos = next(token for token in ends if token in source or token == "</s>")
    tokenizer = byte_tokenizer(data_dir, tuple(sorted({*control, eos})), eos)
    return ChatTemplate(source, tokenizer, ChatConfig(**cfg))


def prompt(text: str = "What is 3*4?", name: str = "p", **more: Any) -> Prompt:
    return Prompt(id=name, messages=(say("user", text),), **more)


def call(expression: str = "3*4", name: str = "calculator") -> str:
    arguments = json.dumps({"name": name, "arguments": {"expression": expression}})
    return f"<tool_call>\n{arguments}\n</tool_call>"


def says(chat: ChatTemplate, *turns: str) -> Scripted:
    """An engine whose k-th turn in a conversation is turns[k], tokenised as one text, and a stop.

    The turn is told by the number of generation prompts that the request holds.
    """
    said = Conversation((say("user", "x"),))
    opener = chat.render(said, add_generation_prompt=True).removeprefix(chat.render(said))

    def answer(request: Any, which: int) -> list[int]:
        seen = chat.tokenizer.decode(list(request.tokens)).count(opener)
        return [*chat.tokenizer.encode(turns[seen - 1]).ids, chat.stop_ids[0]]

    return Scripted(answer)
