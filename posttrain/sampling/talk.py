"""One rollout under way: what was sampled, what tools answered, what is asked next."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.chat.follow import follow_up
from posttrain.chat.parse import broken_call, parse_assistant
from posttrain.chat.template import ChatError, ChatTemplate
from posttrain.sampling.request import Completion, Request, Sampling
from posttrain.tools import Answer, Tool, call_tool, failure
from posttrain.types import Conversation, Finish, Message, Prompt, Rollout

_OPENED = re.compile(r"(?:<think>|\[THINK\])\s*$")
_CALL_ID = re.compile(r"[A-Za-z0-9]{9}")


@dataclass(frozen=True)
class Call:
    """A call as the model made it; broken: why it is none."""

    id: str
    name: str
    arguments: Mapping[str, Any]
    quick: bool
    broken: str = ""


@dataclass
class Talk:
    """One rollout under way."""

    index: int
    group: int
    which: int
    nth: int  # of the prompts with this id
    prompt: Prompt
    tokens: list[int]
    chat: ChatTemplate
    sampling: Sampling
    tools: Mapping[str, Tool]
    max_turns: int
    context: int | None
    weights: list[float] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    plain_logps: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    turns: int = 0
    asked: list[Call] = field(default_factory=list)
    calls: int = 0
    failed_calls: int = 0
    stopped: bool = False  # the last turn ended with a stop token
    drawn_known: bool = True  # the engine gave log-probs of what was drawn from
    plain_known: bool = True  # and those of the model itself

    def __post_init__(self) -> None:
        self._unsampled(len(self.tokens))

    def request(self, seed: int, n: int = 1) -> Request:
        """For the next turn; the first is asked for n rollouts at once."""
        limit = self.sampling.max_new_tokens
        room = limit if self.context is None else min(limit, self.context - len(self.tokens))
        sampling = self.sampling
        if room < limit:
            sampling = sampling.model_copy(update={"max_new_tokens": room})
        # the engine tells the n of a first turn apart by itself
        later = (self.which, self.turns) if self.turns else ()
        own = _seed(seed, self.prompt.id, self.nth, *later)
        said = self._conversation()
        return Request(list(self.tokens), sampling, self.chat.stop_ids, own, n, said)

    def take(self, completion: Completion) -> Finish | None:
        """What the model wrote; None: the calls in `asked` are to be run, else how it ends."""
        new, decode = completion.tokens, self.chat.tokenizer.decode
        opened = _OPENED.search(decode(self.tokens[-8:]))
        self.tokens += new
        self.weights += [1.0] * len(new)
        self.drawn_known &= len(completion.logps) == len(new)
        self.plain_known &= len(completion.plain_logps) == len(new)
        self.logps += completion.logps
        self.plain_logps += completion.plain_logps
        self.turns += 1
        self.stopped = bool(new) and new[-1] in self.chat.stop_ids
        self.text = decode(new[:-1] if self.stopped else new)
        message = parse_assistant((opened[0] if opened else "") + self.text)
        self.asked = self._calls(message) if completion.finish == "stop" and self.tools else []
        self.messages.append(message)
        if not self.asked:
            return completion.finish
        return "turns" if self.turns >= self.max_turns else None

    def _calls(self, message: dict[str, Any]) -> list[Call]:
        """The calls in a message, whose ids are made to differ from those of earlier turns."""
        found = []
        for call in message.get("tool_calls", ()):
            if not _CALL_ID.fullmatch(call["id"]) or call["id"] not in self.text:
                call["id"] = f"call{self.calls + len(found):05d}"
            function = call["function"]
            name = function["name"]
            quick = name not in self.tools or self.tools[name].quick
            found.append(Call(call["id"], name, function["arguments"], quick))
        broken = None if found else broken_call(message["content"])
        return [Call("", "", {}, quick=True, broken=broken)] if broken else found

    def run(self) -> list[Answer]:
        """Runs the calls, one after the other; nothing is raised."""
        return [
            failure(call.broken)
            if call.broken
            else call_tool(self.tools, call.name, call.arguments)
            for call in self.asked
        ]

    def hear(self, answers: Sequence[Answer]) -> Finish | None:
        """Puts the tools' answers behind what was sampled; None: the model is to go on.

        Where the template cannot put them there ("template"), or they leave no room ("length"), the
        rollout ends with the turn that called.
        """
        results: list[Message] = []
        for call, answer in zip(self.asked, answers, strict=True):
            result = {"role": "tool", "content": answer.text}
            if call.id:
                result |= {"name": call.name, "tool_call_id": call.id}
            results.append(result)
        self.calls += len(answers)
        self.failed_calls += sum(answer.failed for answer in answers)
        turn = len(self.prompt.messages) + len(self.messages) - 1
        said = self._conversation(results)
        try:
            ids = follow_up(self.chat, said, turn, stopped=self.stopped)
        except ChatError:  # more calls at once than the template writes, say
            self.failed_calls += sum(not answer.failed for answer in answers)
            return "template"
        if self.context is not None and len(self.tokens) + len(ids) >= self.context:
            return "length"
        self.messages += results
        self.tokens += ids
        self._unsampled(len(ids))
        return None

    def _conversation(self, more: Sequence[Message] = ()) -> Conversation:
        said = (*self.prompt.messages, *self.messages, *more)
        return Conversation(said, self.prompt.tools, self.prompt.template_kwargs)

    def _unsampled(self, count: int) -> None:
        for values in (self.weights, self.logps, self.plain_logps):
            values += [0.0] * count

    def rollout(self, finish: Finish, version: int, first_group: int) -> Rollout:
        def array(values: list[float], known: bool) -> np.ndarray:
            return np.array(values if known else [], np.float32)

        return Rollout(
            prompt=self.prompt,
            messages=tuple(self.messages),
            text=self.text,
            finish=finish,
            tokens=np.array(self.tokens, np.int32),
            loss_weights=array(self.weights, True),
            logps=array(self.logps, self.drawn_known),
            plain_logps=array(self.plain_logps, self.plain_known),
            group=first_group + self.group,
            version=version,
            calls=self.calls,
            failed_calls=self.failed_calls,
        )


def _seed(*parts: int | str) -> int:
    """31 bits that depend on all parts and nothing else."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4]) >> 1
