"""Answers from a server that speaks OpenAI's protocol: a RolloutEngine at the other end of a wire.

`api: completions` sends token ids and takes token ids back where the server gives them (vLLM and
others do, by `return_token_ids`); `api: chat` sends messages, for servers that take nothing else.
Where ids do not come back, the text is tokenised here: good enough to judge and to keep as text,
not to train on by log-probs. What came back how is counted.
"""

from __future__ import annotations

import hashlib
import json
import queue
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from posttrain.chat.template import ChatTemplate
from posttrain.config import semantic
from posttrain.openai_client import Client, EndpointConfig
from posttrain.sampling.request import Completion, OnDone, Request, Sampling

Finish = Literal["stop", "length"]

# what OpenAI's own servers do not know, and vLLM, SGLang and llama.cpp do
_EXTRAS = ("top_k", "min_p", "repetition_penalty")


class RemoteConfig(EndpointConfig):
    """A server that answers prompts."""

    api: Literal["completions", "chat"] = semantic(
        "completions", help="what it is sent: completions (token ids) or chat (messages)"
    )
    extras: bool = semantic(
        True, help="it knows fields beyond OpenAI's (top_k, stop_token_ids, return_token_ids)"
    )


class RemoteEngine:
    """A server's model. chat: the template and the tokenizer that this model has, too."""

    def __init__(self, cfg: RemoteConfig, chat: ChatTemplate) -> None:
        self.cfg, self._chat, self._client = cfg, chat, Client(cfg)
        self.came_as: Counter[str] = Counter()
        """Completions that came back as "ids", or as "text" that was tokenised here."""

    def told(self) -> str:
        """What a user should know of how answers came back; "" for nothing."""
        if not self.came_as["text"]:
            return ""
        return (
            f"{self.came_as['text']:,} of {self.came_as.total():,} answers came back as text alone "
            "and were tokenised here: their lengths in tokens may be others than the server's"
        )

    def update(self, params: Any) -> None:
        """ValueError: a server's weights are its own."""
        raise ValueError(
            "a server's weights cannot be changed from here: train with our own engine"
        )

    def generate(
        self, requests: Sequence[Request], on_done: OnDone | None = None
    ) -> list[list[Completion]]:
        """As RolloutEngine says. on_done is called in the calling thread. The seed of the which-th
        completion is made of the request's and `which`; whether the server heeds it is its affair.

        Raises ValueError before anything is sent, or where an answer is none; EndpointError where
        the server does not answer, which ends it all.
        """
        wrong = [f"request {i}: {why}" for i, r in enumerate(requests) for why in self._refusals(r)]
        if wrong:
            raise ValueError("\n    ".join(["the server cannot answer these:", *wrong[:10]]))
        done: dict[tuple[int, int], Completion] = {}
        ended: queue.SimpleQueue[tuple[int, int, Completion | BaseException]] = queue.SimpleQueue()

        def ask(index: int, which: int, request: Request) -> None:
            try:
                ended.put((index, which, self._complete(request, which)))
            except BaseException as error:  # told where on_done is called
                ended.put((index, which, error))

        threads = ThreadPoolExecutor(self.cfg.concurrency, thread_name_prefix="remote")
        try:
            left = 0
            for index, request in enumerate(requests):
                for which in range(request.n):
                    threads.submit(ask, index, which, request)
                    left += 1
            while left:
                index, which, found = ended.get()
                if isinstance(found, BaseException):
                    raise found
                done[index, which] = found
                more = on_done(index, which, found) if on_done else None
                if more is None:
                    left -= 1
                else:
                    threads.submit(ask, index, which, more)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        return [[done[i, which] for which in range(r.n)] for i, r in enumerate(requests)]

    def _refusals(self, request: Request) -> list[str]:
        """Why it cannot be answered."""
        plain, wrong = Sampling(), []
        if not self.cfg.extras:
            wrong += [
                f"sampling.{name} is no field of OpenAI's protocol, and extras are off"
                for name in _EXTRAS
                if getattr(request.sampling, name) != getattr(plain, name)
            ]
        if self.cfg.api == "chat" and request.conversation is None:
            wrong.append("api: chat needs the conversation that the tokens are of")
        return wrong

    def _complete(self, request: Request, which: int) -> Completion:
        if self.cfg.api == "chat":
            return self._chat_completion(request, which)
        body = self._body(request, which) | {"prompt": list(request.tokens), "logprobs": 1}
        if self.cfg.extras:
            body |= {"return_token_ids": True, "skip_special_tokens": False}
            body |= {"stop_token_ids": list(request.stop_ids), "include_stop_str_in_output": True}
        choice = _choice(self._client.post("completions", body))
        text, finish = choice.get("text"), _finish(choice)
        if not isinstance(text, str):
            raise ValueError(f"the server's answer holds no text: {_shown(choice)}")
        ids, logps = _ids(choice), _logps(choice)
        self.came_as["text" if ids is None else "ids"] += 1
        if ids is None:
            ids, logps = self._chat.tokenizer.encode(text).ids, []
        return self._closed(request, ids, logps, finish)

    def _chat_completion(self, request: Request, which: int) -> Completion:
        assert request.conversation is not None, "refused at the door"
        said = request.conversation
        body = self._body(request, which) | {"messages": [_sent(m) for m in said.messages]}
        if said.tools:
            body["tools"] = [dict(tool) for tool in said.tools]
        choice = _choice(self._client.post("chat/completions", body))
        message = choice.get("message")
        if not isinstance(message, Mapping):
            raise ValueError(f"the server's answer holds no message: {_shown(choice)}")
        self.came_as["text"] += 1
        ids = self._chat.tokenizer.encode(_written(message)).ids
        return self._closed(request, ids, [], _finish(choice))

    def _closed(
        self,
        request: Request,
        ids: list[int],
        logps: list[float],
        finish: Literal["stop", "length"],
    ) -> Completion:
        """With the stop token that servers leave out of what they say."""
        ended = bool(ids) and ids[-1] in request.stop_ids
        if finish == "stop" and not ended and not request.sampling.stop and request.stop_ids:
            ids = [*ids, request.stop_ids[0]]
        known = logps if len(logps) == len(ids) else []
        # what servers give is the model's own, unless they are told to give another
        return Completion(ids, known if _is_plain(request.sampling) else [], known, finish)

    def _body(self, request: Request, which: int) -> dict[str, Any]:
        sampling, plain = request.sampling, Sampling()
        body: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": _seed(request.seed, which),
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.presence_penalty:
            body["presence_penalty"] = sampling.presence_penalty
        if sampling.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
        for name in _EXTRAS:
            if getattr(sampling, name) != getattr(plain, name):
                body[name] = getattr(sampling, name)
        return body


def _choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise ValueError(f"the server's answer holds no choices: {_shown(answer)}")
    return choices[0]


def _finish(choice: Mapping[str, Any]) -> Finish:
    return "length" if choice.get("finish_reason") == "length" else "stop"


def _ids(choice: Mapping[str, Any]) -> list[int] | None:
    """The ids that were sampled: `token_ids`, or tokens that are called "token_id:17"."""
    ids = choice.get("token_ids")
    if isinstance(ids, list) and all(isinstance(i, int) for i in ids):
        return list(ids)
    tokens = (choice.get("logprobs") or {}).get("tokens")
    named = isinstance(tokens, list) and all(str(t).startswith("token_id:") for t in tokens)
    return [int(t.removeprefix("token_id:")) for t in tokens] if named and tokens else None


def _logps(choice: Mapping[str, Any]) -> list[float]:
    found = (choice.get("logprobs") or {}).get("token_logprobs")
    known = isinstance(found, list) and all(isinstance(x, int | float) for x in found)
    return [float(x) for x in found] if known and found else []


def _is_plain(sampling: Sampling) -> bool:
    """Whether what is drawn from is the model itself."""
    return sampling == Sampling(max_new_tokens=sampling.max_new_tokens, stop=sampling.stop)


def _sent(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the protocol has it: the arguments of calls as JSON text."""
    out = {key: value for key, value in message.items() if key != "weight"}
    if out.get("tool_calls"):
        out["tool_calls"] = [_sent_call(call) for call in out["tool_calls"]]
    return out


def _sent_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _written(message: Mapping[str, Any]) -> str:
    """A message as text that `parse_assistant` reads back."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    text = f"<think>\n{thought}\n</think>\n\n" if thought else ""
    text += message.get("content") or ""
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function.get("arguments") or "{}"
        text += f'\n<tool_call>\n{{"name": {json.dumps(function["name"])}, '
        text += f'"arguments": {arguments}}}\n</tool_call>'
    return text


def _seed(seed: int, which: int) -> int:
    """31 bits: servers differ in how much they take."""
    return int.from_bytes(hashlib.sha256(f"{seed} {which}".encode()).digest()[:4]) >> 1


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 200 else text[:197] + "..."
