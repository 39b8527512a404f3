"""A client for servers that speak OpenAI's HTTP interface (vLLM, SGLang, llama.cpp, paid ones).

Answers may be kept on disk, by a hash of all that was asked, so that a run that is repeated asks
nothing twice. Keys come from the environment, and are neither written nor told.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config import Config, runtime, semantic

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds


class EndpointConfig(Config):
    """A server, and how it is asked."""

    base_url: str = semantic(
        pattern=r"^https?://.*[^/]$", help="its address up to the version: http://localhost:8000/v1"
    )
    model: str = semantic(min_length=1, help="the model's name there")
    key_env: str = runtime("", help="environment variable with the key; empty: none is sent")
    timeout: float = runtime(120.0, gt=0, help="seconds that one request may take")
    retries: int = runtime(6, ge=0, help="how often a request that failed is sent again")
    concurrency: int = runtime(16, gt=0, help="requests at once")
    cache_dir: str = runtime("", help="folder that answers are kept in; empty: none are")


class EndpointError(RuntimeError):
    """The server did not answer, or said no. status: of HTTP, 0 where there was none."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


class _Again(EndpointError):
    """Worth another try. after: seconds that the server asks for, if it does."""

    def __init__(self, message: str, status: int = 0, after: float | None = None):
        super().__init__(message, status)
        self.after = after


class Client:
    """Asks one server. Thread-safe; at most `concurrency` requests are under way.

    ValueError: the environment variable of the key is not set.
    """

    def __init__(self, cfg: EndpointConfig):
        self.cfg = cfg
        self._room = threading.BoundedSemaphore(cfg.concurrency)
        self._headers = {"Content-Type": "application/json"}
        if cfg.key_env:
            key = os.environ.get(cfg.key_env)
            if not key:
                raise ValueError(f"key_env: the environment variable {cfg.key_env} is not set")
            self._headers["Authorization"] = f"Bearer {key}"

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
        """The server's answer to POST chat/completions, whole; options are further keys of it."""
        return self.post("chat/completions", {"messages": list(messages), **options})

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request with `model` added to the body; from the disk where it is there.

        Waits and asks again where the server is away, busy or broken. EndpointError: it still is,
        or it refuses what is asked.
        """
        body = {"model": self.cfg.model, **body}
        kept = self._kept(path, body)
        if kept is not None and (found := _read(kept)) is not None:
            return found
        for tried in range(self.cfg.retries + 1):
            try:
                with self._room:
                    answer = self._once(path, body)
                break
            except _Again as error:
                if tried == self.cfg.retries:
                    message = f"{error} (asked {tried + 1} times)"
                    raise EndpointError(message, error.status) from error
                wait = min(_FIRST_WAIT * 2**tried, _LONGEST_WAIT) * random.uniform(0.5, 1.5)
                time.sleep(wait if error.after is None else min(error.after, _LONGEST_WAIT))
        if kept is not None:
            _write(kept, answer)
        return answer

    def _kept(self, path: str, body: Mapping[str, Any]) -> Path | None:
        if not self.cfg.cache_dir:
            return None
        text = json.dumps([self.cfg.base_url, path, body], sort_keys=True)
        name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return Path(self.cfg.cache_dir).expanduser() / name[:2] / f"{name}.json"

    def _once(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        url = f"{self.cfg.base_url}/{path}"
        request = urllib.request.Request(
            url, json.dumps(body).encode(), self._headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.cfg.timeout) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise _refusal(url, error) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise _Again(f"{url}: {type(error).__name__}: {reason}") from error
        try:
            answer = json.loads(text)
        except ValueError as error:
            shown = text[:200].decode("utf-8", "replace")
            raise _Again(f"{url}: the answer is no JSON: {shown!r}") from error
        if not isinstance(answer, dict):
            raise EndpointError(f"{url}: the answer is no object: {str(answer)[:200]!r}")
        return answer


def _refusal(url: str, error: urllib.error.HTTPError) -> EndpointError:
    try:
        said = error.read(4096).decode("utf-8", "replace").strip()
    except OSError:
        said = ""
    hint = "; is key_env right?" if error.code in (401, 403) else ""
    message = f"{url}: HTTP {error.code} {error.reason}: {said[:300] or 'nothing said'}{hint}"
    if error.code not in _AGAIN:
        return EndpointError(message, error.code)
    after = error.headers.get("Retry-After", "") if error.headers else ""
    return _Again(message, error.code, float(after) if after.isdigit() else None)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, answer: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_text(json.dumps(answer), encoding="utf-8")
    temporary.replace(path)
