"""An engine at the other end of a wire, against a small server on the loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from posttrain.chat.template import ChatTemplate
from posttrain.openai_client import EndpointError
from posttrain.sampling.conversation import make_rollouts
from posttrain.sampling.remote import RemoteConfig, RemoteEngine
from posttrain.sampling.request import Request, Sampling
from posttrain.types import Conversation
from tests.chat.samples import say
from tests.http_server import Served, serving
from tests.sampling.scripted import SAMPLING, TOOLS, call, prompt


class Server:
    """Answers by a function that a test sets."""

    def __init__(self, served: Served) -> None:
        self.url, self._served = served.base_url, served
        self.answer: Callable[[dict[str, Any]], Any] = lambda body: {}

    @property
    def asked(self) -> list[tuple[str, dict[str, Any]]]:
        return [(path, body) for path, body, _ in self._served.asked]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(lambda number, body: (200, made.answer(body), {})) as served:
        made = Server(served)
        yield made


def engine(server: Server, chat: ChatTemplate, **options: Any) -> RemoteEngine:
    cfg = RemoteConfig(base_url=server.url, model="tiny", retries=0, **options)
    return RemoteEngine(cfg, chat)


def choice(text: str, ids: list[int] | None = None, finish: str = "stop", **more: Any) -> Any:
    found = {"text": text, "finish_reason": finish, **more}
    return {"choices": [found if ids is None else {**found, "token_ids": ids}]}


def logprobs(values: list[float], tokens: list[str] | None = None) -> dict[str, Any]:
    return {"tokens": tokens or ["x"] * len(values), "token_logprobs": values}


def test_what_is_sent_and_what_comes_back(server: Server, chatml: ChatTemplate):
    stop = chatml.stop_ids[0]
    server.answer = lambda body: choice("ab", [70, 71, stop], logprobs=logprobs([-1.0, -2.0, -0.5]))
    remote = engine(server, chatml)
    plain = Sampling(max_new_tokens=9)
    request = Request([5, 6, 7], plain, (stop,), seed=3, n=2)
    ((first, second),) = remote.generate([request])
    assert first == second
    assert (first.tokens, first.finish) == ([70, 71, stop], "stop")
    assert first.logps == first.plain_logps == [-1.0, -2.0, -0.5]
    (path, body), (_, other) = server.asked
    seeds = {body.pop("seed"), other.pop("seed")}
    assert body == other
    assert (path, len(seeds)) == ("/v1/completions", 2)
    assert body == {
        "model": "tiny",
        "prompt": [5, 6, 7],
        "max_tokens": 9,
        "temperature": 1.0,
        "top_p": 1.0,
        "logprobs": 1,
        "return_token_ids": True,
        "skip_special_tokens": False,
        "stop_token_ids": [stop],
        "include_stop_str_in_output": True,
    }
    remote.generate([request])
    assert {body["seed"] for _, body in server.asked[2:]} == seeds
    assert remote.came_as == {"ids": 4}


def test_log_probs_of_another_distribution_are_not_made_up(server: Server, chatml: ChatTemplate):
    stop = chatml.stop_ids[0]
    server.answer = lambda body: choice("", [70, stop], logprobs=logprobs([-1.0, -2.0]))
    sampling = Sampling(
        temperature=0.5, top_k=4, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.3,
        logit_bias={7: -2.0}, stop=("x",)
    )  # fmt: skip
    ((found,),) = engine(server, chatml).generate([Request([5], sampling, (stop,))])
    assert (found.logps, found.plain_logps) == ([], [-1.0, -2.0])
    body = server.asked[0][1]
    given = sampling.model_dump(exclude={"max_new_tokens", "logit_bias", "stop"})
    assert {name: body[name] for name in given} == given
    assert (body["logit_bias"], body["stop"]) == ({"7": -2.0}, ["x"])


@pytest.mark.parametrize(
    ("answer", "ids", "plain", "finish"),
    [
        # named ids, the stop token left out; its log-prob is not known
        (choice("", logprobs=logprobs([-1.0], ["token_id:70"])), [70, "stop"], [], "stop"),
        (choice("hi", finish="length"), "hi", [], "length"),
        (choice("hi"), ["hi", "stop"], [], "stop"),
        (choice("", [70], "length", logprobs=logprobs([-1.0])), [70], [-1.0], "length"),
        (choice("", [70], "length", logprobs=None), [70], [], "length"),
    ],
)
def test_servers_differ_in_what_they_give(
    server: Server, chatml: ChatTemplate, answer: Any, ids: Any, plain: list[float], finish: str
):
    encoded = {"hi": chatml.tokenizer.encode("hi").ids, "stop": [chatml.stop_ids[0]]}
    parts = [ids] if isinstance(ids, str) else ids
    wanted = [i for part in parts for i in encoded.get(part, [part])]
    server.answer = lambda body: answer
    ((found,),) = engine(server, chatml).generate([Request([5], SAMPLING, chatml.stop_ids)])
    assert (found.tokens, found.plain_logps, found.finish) == (wanted, plain, finish)


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"text": None}]}])
def test_an_answer_that_is_none_ends_it(server: Server, chatml: ChatTemplate, answer: Any):
    server.answer = lambda body: answer
    with pytest.raises(ValueError, match="the server's answer holds no"):
        engine(server, chatml).generate([Request([5], SAMPLING)] * 3)


def test_errors_of_the_wire_are_raised(chatml: ChatTemplate):
    with serving(lambda number, body: (400, "no such model", {})) as served:
        remote = engine(Server(served), chatml)
        with pytest.raises(EndpointError, match="no such model"):
            remote.generate([Request([5], SAMPLING)])


def test_what_cannot_be_asked_is_refused_before_anything_is_sent(
    server: Server, chatml: ChatTemplate
):
    odd = Request([5], Sampling(top_k=3, min_p=0.1))
    with pytest.raises(ValueError, match=r"request 1: sampling\.top_k") as error:
        engine(server, chatml, extras=False).generate([Request([5], SAMPLING), odd])
    assert "sampling.min_p" in str(error.value)
    with pytest.raises(ValueError, match="needs the conversation"):
        engine(server, chatml, api="chat").generate([odd])
    with pytest.raises(ValueError, match="weights cannot be changed"):
        engine(server, chatml).update({})
    assert server.asked == []


def test_many_at_a_time_and_turns_in_their_place(server: Server, chatml: ChatTemplate):
    """The first answer waits until three requests are there; follow-ups go out as turns end."""
    three = threading.Barrier(3, timeout=20)
    tokenizer, stop = chatml.tokenizer, chatml.stop_ids[0]

    def answer(body: dict[str, Any]) -> Any:
        text = tokenizer.decode(body["prompt"])
        if "<|im_start|>tool" in text:
            return choice("", [*tokenizer.encode("12.").ids, stop], logprobs=None)
        three.wait()
        return choice("", [*tokenizer.encode(call()).ids, stop])

    server.answer = answer
    remote = engine(server, chatml, concurrency=3)
    rollouts = make_rollouts([prompt()], remote, chatml, SAMPLING, n=3, tools=TOOLS)
    assert [r.messages[-1] for r in rollouts] == [say("assistant", "12.")] * 3
    assert [(r.calls, r.finish, r.logps.size) for r in rollouts] == [(1, "stop", 0)] * 3
    assert len({body["seed"] for _, body in server.asked}) == 6


def test_a_server_that_takes_messages(server: Server, chatml: ChatTemplate):
    function = {"name": "calculator", "arguments": '{"expression": "3*4"}'}
    calls = [{"id": "abcdefghi", "type": "function", "function": function}]

    def answer(body: dict[str, Any]) -> Any:
        if body["messages"][-1]["role"] == "tool":
            message = {"content": "Twelve.", "reasoning_content": "Good."}
        else:
            message = {"content": None, "tool_calls": calls}
        return {"choices": [{"message": message, "finish_reason": "stop"}]}

    server.answer = answer
    remote = engine(server, chatml, api="chat", extras=False)
    (rollout,) = make_rollouts([prompt()], remote, chatml, SAMPLING, tools=TOOLS)
    called, told, said = rollout.messages
    assert called["tool_calls"][0]["function"]["arguments"] == {"expression": "3*4"}
    assert told["content"] == "12"
    assert said == say("assistant", "Twelve.", reasoning_content="Good.")
    assert (rollout.finish, rollout.logps.size, remote.came_as) == ("stop", 0, {"text": 2})
    (path, first), (_, second) = server.asked
    assert path == "/v1/chat/completions"
    assert first["messages"] == [say("user", "What is 3*4?")]
    assert first["tools"] == [TOOLS["calculator"].schema]
    assert "top_k" not in first
    sent = second["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(sent) == {"expression": "3*4"}, "as text, as the protocol has it"
    assert second["messages"][2]["content"] == "12"


def test_the_conversation_travels_with_the_tokens(server: Server, chatml: ChatTemplate):
    said = Conversation((say("user", "Hi"),))
    server.answer = lambda body: {
        "choices": [{"message": {"content": "Ho"}, "finish_reason": "length"}]
    }
    request = Request([5], SAMPLING, chatml.stop_ids, conversation=said)
    ((found,),) = engine(server, chatml, api="chat").generate([request])
    assert (chatml.tokenizer.decode(found.tokens), found.finish) == ("Ho", "length")
