"""Conversations to tokens and loss weights, through a model's own chat template.

What is trained comes from character spans of the ONE rendered string, mapped to tokens by their
offsets: nothing is decoded and encoded again, and no turn is rendered alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.chat.check import check_template, learn_stops
from posttrain.chat.config import ChatConfig
from posttrain.chat.encoding import Encoding, token_range
from posttrain.chat.render import ChatError, Part, Rendered, Renderer
from posttrain.chat.source import find_source
from posttrain.chat.spans import Span, SpanError, SpanFinder
from posttrain.chat.tokenizer import Tokenizer
from posttrain.chat.traced import NOBODY
from posttrain.types import Conversation, Example, Message, Text

__all__ = ["ChatConfig", "ChatError", "ChatTemplate", "Part"]


class ChatTemplate:
    """One template with one tokenizer. Picklable; safe to use from several threads.

    ValueError where the source is no Jinja or `chat.stop` names what is no token.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, cfg: ChatConfig) -> None:
        self.source, self.tokenizer, self.cfg = source, tokenizer, cfg
        self.renderer = Renderer(source, tokenizer.special_tokens, cfg.template_kwargs, cfg.date)
        self._in_prose = frozenset(cfg.assistant_tokens) & tokenizer.added_tokens.keys()
        for stop in cfg.stop:
            if tokenizer.token_id(stop) is None:
                raise ValueError(
                    f"chat.stop: {stop!r} is no token of the tokenizer; add it with "
                    "model.new_tokens or name a token that ends a turn"
                )
        known = [*map(tokenizer.token, tokenizer.stop_ids), *cfg.stop]
        self.stop_texts = tuple(
            dict.fromkeys([*known, *learn_stops(self.renderer, known, self._special_texts())])
        )

    @classmethod
    def load(cls, model_path: str | Path, tokenizer: Tokenizer, cfg: ChatConfig) -> ChatTemplate:
        """The template that cfg names, else the model folder's own. ValueError: there is none."""
        source = find_source(Path(model_path), tokenizer.chat_template, cfg.template)
        return cls(source, tokenizer, cfg)

    def __reduce__(self) -> Any:
        return ChatTemplate, (self.source, self.tokenizer, self.cfg)

    def _special_texts(self) -> list[str]:
        return [self.tokenizer.token(i) for i in sorted(self.tokenizer.special_ids)]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a turn: the tokenizer's, the template's, those of `chat.stop`."""
        ids = [self.tokenizer.token_id(text) for text in self.stop_texts]
        return tuple(i for i in ids if i is not None)

    def fingerprint(self) -> str:
        """A hash of everything that decides tokens and weights."""
        state = [self.source, self.cfg.model_dump(mode="json"), self.tokenizer.fingerprint()]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write chat_template.jinja, where transformers looks for it."""
        (Path(folder) / "chat_template.jinja").write_text(self.source, encoding="utf-8")

    def check(self) -> list[str]:
        """What a user should know of this template before training with it; [] for nothing."""
        return check_template(self.renderer, self.tokenizer, self.parts, self._encode)

    def render(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        """The text, as transformers' apply_chat_template writes it. ChatError where the template
        refuses the conversation."""
        return self.renderer.render(conversation, prompt=add_generation_prompt).trace.text

    def generation_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), **kwargs: Any
    ) -> list[int]:
        """Token ids to generate an answer from; kwargs are variables for the template.

        ChatError where the template drops a message's text or the tools.
        """
        conversation = Conversation(tuple(messages), tuple(tools), kwargs)
        part = self.renderer.render(conversation, prompt=True)
        self._refuse_lost(part)
        return self._encode(part).ids

    def examples(self, conversation: Conversation) -> list[Example]:
        """Tokens and loss weights; several examples where dropped thinking forces a split.

        ChatError where what the assistant must write cannot be found exactly, where the template
        drops a field, or where nothing would be trained.
        """
        return [self._weigh(part, self._encode(part.rendered)) for part in self.parts(conversation)]

    def examples_batch(
        self, conversations: Sequence[Conversation]
    ) -> list[list[Example] | ChatError]:
        """`examples` of many conversations, encoded together; an error stands in its place."""
        out: list[list[Example] | ChatError] = []
        jobs: list[tuple[int, Part]] = []
        for i, conversation in enumerate(conversations):
            try:
                jobs += [(i, part) for part in self.parts(conversation)]
                out.append([])
            except ChatError as error:
                out.append(error)
        sources = [part.rendered.sources() for _, part in jobs]
        encodings = self.tokenizer.encode_batch(
            [part.rendered.trace.text for _, part in jobs],
            [trusted for trusted, _ in sources],
            [prose for _, prose in sources],
            self._in_prose,
        )
        for (i, part), encoding in zip(jobs, encodings, strict=True):
            done = out[i]
            if isinstance(done, ChatError):
                continue
            try:
                if isinstance(encoding, ValueError):
                    raise ChatError(str(encoding), part.rendered.trace.text)
                done.append(self._weigh(part, encoding))
            except ChatError as error:
                out[i] = error
        return out

    def text_example(self, text: Text) -> Example:
        """Plain text, or a prompt and its completion: BOS where the tokenizer adds one, EOS at
        the end, the completion and EOS trained. ChatError where there is nothing to train."""
        whole = text.prompt + text.completion
        if not text.completion:
            raise ChatError("nothing to train: the completion is empty", whole)
        eos = self.tokenizer.eos_id
        if eos is None:
            raise ChatError("the tokenizer names no EOS token to end a text with")
        trusted = None if self.cfg.text_control_tokens else ()
        encoding = self.tokenizer.encode(whole, trusted=trusted)
        ids, bos = encoding.ids, self.tokenizer.bos_id
        head = [bos] if self.tokenizer.adds_bos and bos is not None and ids[:1] != [bos] else []
        tail = [eos] if ids[-1:] != [eos] else []
        low, high = token_range(encoding, len(text.prompt), len(whole))
        weights = np.zeros(len(head) + len(ids) + len(tail), np.float32)
        weights[len(head) + low : len(head) + high] = 1
        weights[len(head) + len(ids) :] = 1
        weights[0] = 0
        return Example(np.array(head + ids + tail, np.int32), weights)

    def parts(self, conversation: Conversation) -> list[Part]:
        """What is trained of a conversation, before it is encoded. Raises as `examples` does."""
        weights = self._weights(conversation)
        if not weights:
            raise ChatError(
                "nothing to train: no assistant turn has a weight above 0", str(conversation)
            )
        left = sorted(weights)
        current = conversation
        parts: list[Part] = []
        while left:
            rendered = self.renderer.render(current)
            self._refuse_lost(rendered)
            text = rendered.trace.text
            lost = {item.message for item in rendered.lost} & set(left)
            if lost and self.cfg.dropped_thinking == "refuse":
                raise ChatError(
                    f"the template drops the thinking of messages {sorted(lost)}; "
                    "chat.dropped_thinking: split makes one example per turn",
                    text,
                )
            if left[-1] in lost and len(current.messages) == left[-1] + 1:
                raise ChatError(f"the template drops the thinking of message {left[-1]}", text)
            # the last turn decides: where its thinking is lost, cut the conversation after it
            kept = [] if left[-1] in lost else [i for i in left if i not in lost]
            if kept:
                parts.append(Part(rendered, self.spans(rendered, kept), weights))
                left = sorted(lost)
            if left:
                current = Conversation(
                    conversation.messages[: left[-1] + 1],
                    conversation.tools,
                    conversation.template_kwargs,
                )
        return parts[::-1]

    def _weights(self, conversation: Conversation) -> dict[int, float]:
        turns = [i for i, m in enumerate(conversation.messages) if m.get("role") == "assistant"]
        if self.cfg.train_on == "last":
            turns = turns[-1:]
        weights = {i: float(conversation.messages[i].get("weight", 1.0)) for i in turns}
        return {i: weight for i, weight in weights.items() if weight > 0}

    def _refuse_lost(self, part: Rendered) -> None:
        """Nothing but an assistant's thinking may be missing from the text."""
        for lost in part.lost:
            if lost.message == NOBODY:
                raise ChatError(
                    "the template drops the tools (chat.template names another: a file, chatml)",
                    part.trace.text,
                )
            role, message = part.roles[lost.message], part.messages[lost.message]
            thought = lost.field == "reasoning_content" or "</think>" in str(message["content"])
            if role != "assistant" or not thought:
                raise ChatError(
                    f"the template drops or changes the {lost.field} of message "
                    f"{lost.message} ({role})",
                    part.trace.text,
                )

    def spans(self, part: Rendered, turns: list[int]) -> list[Span]:
        """What the assistant wrote in these turns of a rendering. ChatError where that is not
        found exactly."""
        finder = SpanFinder(part.trace, part.roles, self.stop_texts)
        try:
            if part.trace.blocks:
                return finder.marked(turns)
            return [
                finder.turn(i, self.renderer.prompts(part, i), self.tokenizer.encode) for i in turns
            ]
        except SpanError as error:
            raise ChatError(str(error), part.trace.text) from error

    def _encode(self, part: Rendered) -> Encoding:
        trusted, prose = part.sources()
        try:
            return self.tokenizer.encode(
                part.trace.text, trusted=trusted, prose=prose, in_prose=self._in_prose
            )
        except ValueError as error:
            raise ChatError(str(error), part.trace.text) from error

    def _weigh(self, part: Part, encoding: Encoding) -> Example:
        weights = np.zeros(len(encoding.array), np.float32)
        for span in part.spans:
            start = span.start if self.cfg.train_thinking else span.thinking
            end = span.tail if self.cfg.train_tail else span.end
            low, high = token_range(encoding, start, end)
            weights[low:high] = part.weights[span.message]
        weights[:1] = 0
        if not weights.any():
            raise ChatError("nothing to train: every token is masked", part.rendered.trace.text)
        return Example(encoding.array, weights)
