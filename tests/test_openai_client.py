"""Requests to a server that is away, busy or refuses; the key; answers kept on disk."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain import openai_client
from posttrain.openai_client import Client, EndpointConfig, EndpointError
from tests.http_server import said, serving

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "_FIRST_WAIT", 0.001)


def client(base_url: str, **settings: Any) -> Client:
    return Client(EndpointConfig(base_url=base_url, model="m", **settings))


def test_what_is_sent_and_what_comes_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with serving(lambda number, body: (200, said(body["messages"][0]["content"]), {})) as served:
        answer = client(served.base_url, key_env="MY_KEY").chat(HELLO, temperature=0.5)
    assert answer["choices"][0]["message"]["content"] == "hi"
    path, body, headers = served.asked[0]
    assert path == "/v1/chat/completions"
    assert body == {"model": "m", "messages": HELLO, "temperature": 0.5}
    assert headers["Authorization"] == "Bearer s3cret"


def test_it_asks_again_where_that_may_help():
    answers = [(503, "busy", {}), (429, "slow", {"Retry-After": "0"}), (200, "<html>", {})]
    with serving(lambda number, body: [*answers, (200, said("yes"), {})][number]) as served:
        assert client(served.base_url).chat(HELLO) == said("yes")
        assert len(served.asked) == 4


def test_it_waits_as_long_as_the_server_asks_for():
    answers = [(429, "slow", {"Retry-After": "1"}), (200, said("yes"), {})]
    with serving(lambda number, body: answers[number]) as served:
        began = time.monotonic()
        client(served.base_url).chat(HELLO)
        assert time.monotonic() - began >= 1


def test_it_gives_up():
    with serving(lambda number, body: (500, "on fire", {})) as served:
        with pytest.raises(EndpointError, match=r"HTTP 500 .*on fire \(asked 3 times\)") as error:
            client(served.base_url, retries=2).chat(HELLO)
        assert error.value.status == 500
        assert len(served.asked) == 3
    with pytest.raises(EndpointError, match="refused"):
        client(served.base_url, retries=1).chat(HELLO)


def test_a_refusal_is_final():
    with serving(lambda number, body: (401, {"error": "no such key"}, {})) as served:
        with pytest.raises(EndpointError, match=r"HTTP 401 .*no such key.*is key_env right\?"):
            client(served.base_url).chat(HELLO)
        assert len(served.asked) == 1


def test_answers_are_kept_on_disk(tmp_path: Path):
    with serving(lambda number, body: (200, said(f"answer {number}"), {})) as served:
        kept = {"cache_dir": str(tmp_path)}
        assert client(served.base_url, **kept).chat(HELLO) == said("answer 0")
        assert client(served.base_url, **kept).chat(HELLO) == said("answer 0")
        assert client(served.base_url, **kept).chat(HELLO, seed=1) == said("answer 1")
        assert client(served.base_url).chat(HELLO) == said("answer 2")
        (first, _) = sorted(tmp_path.rglob("*.json"), key=lambda p: p.read_text())
        first.write_text('{"cut o')
        assert client(served.base_url, **kept).chat(HELLO) == said("answer 3"), "made again"
    assert not list(tmp_path.rglob("*.tmp"))


def test_no_more_at_once_than_was_said():
    lock, now, most = threading.Lock(), 0, 0

    def answer(number: int, body: Any) -> tuple[int, Any, dict[str, str]]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return 200, said("x"), {}

    with serving(answer) as served, ThreadPoolExecutor(12) as pool:
        asker = client(served.base_url, concurrency=3)
        list(pool.map(lambda _: asker.chat(HELLO), range(12)))
    assert 1 < most <= 3


def test_what_is_wrong_with_the_config(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable NO_KEY is not set"):
        client("http://localhost/v1", key_env="NO_KEY")
    for wrong in ("localhost:8000/v1", "http://localhost/v1/"):
        with pytest.raises(ValidationError, match="base_url"):
            client(wrong)
