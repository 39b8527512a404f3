"""A server on the loopback that answers as a test tells it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Served:
    """base_url, and what was asked: (path, body, headers) of each request, in order."""

    base_url: str = ""
    asked: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)


@contextlib.contextmanager
def serving(answer: Callable[[int, Any], tuple[int, Any, dict[str, str]]]) -> Iterator[Served]:
    """answer(number of the request, body) -> (status, JSON or text, headers)."""
    served, lock = Served(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                served.asked.append((self.path, body, dict(self.headers)))
                number = len(served.asked) - 1
            status, said, headers = answer(number, body)
            data = (said if isinstance(said, str) else json.dumps(said)).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


def said(text: str) -> dict[str, Any]:
    """The body of a chat completion with one choice."""
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
