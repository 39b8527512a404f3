"""A stand-in for Cloud Storage: what tensorstore and etils ask of it, out of a local folder.

Tensorstore speaks its real protocol to a server on the loopback. For etils an implementation of
fsspec that knows the same folder takes the place of gcsfs: neither gcsfs nor Google is tried.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class Bucket(DirFileSystem):
    """gs://BUCKET/NAME is <folder>/BUCKET/NAME. As in a store, folders need not be made."""

    protocol = ("gcs", "gs")
    root = ""

    def __init__(self, **_: Any):
        super().__init__(path=type(self).root, fs=LocalFileSystem(auto_mkdir=True))

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        path = str(path)
        for name in cls.protocol:
            path = path.removeprefix(f"{name}://")
        return path.strip("/")

    def _join(self, path: Any) -> Any:
        return super()._join(self._strip_protocol(path)) if isinstance(path, str) else path

    def rename(self, *_: Any, **__: Any) -> None:
        raise OSError("a store renames nothing")

    mv = move = rename


def _server(root: Path) -> ThreadingHTTPServer:
    """The part of the JSON API of Cloud Storage that tensorstore's driver "gcs" uses."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def parts(self) -> tuple[str, str, dict[str, str]]:
            url = urlparse(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            bucket, _, name = url.path.partition("/b/")[2].partition("/o")
            return bucket, unquote(name.removeprefix("/")), query

        def say(self, code: int, body: bytes | dict[str, Any] = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def about(self, bucket: str, name: str) -> dict[str, Any]:
            stat = (root / bucket / name).stat()
            size, generation = str(stat.st_size), str(stat.st_mtime_ns)
            return {"name": name, "bucket": bucket, "size": size, "generation": generation}

        def do_GET(self) -> None:
            bucket, name, query = self.parts()
            file = root / bucket / name
            if not name:
                found = (p for p in sorted((root / bucket).rglob("*")) if p.is_file())
                names = (p.relative_to(root / bucket).as_posix() for p in found)
                prefix = query.get("prefix", "")
                items = [self.about(bucket, n) for n in names if n.startswith(prefix)]
                return self.say(200, {"kind": "storage#objects", "items": items})
            if not file.is_file():
                return self.say(404, {"error": {"code": 404}})
            about = self.about(bucket, name)
            if query.get("alt") != "media":
                return self.say(200, about)
            data, marks = file.read_bytes(), {"x_goog_generation": about["generation"]}
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start = int(first) if first else len(data) - int(last)
                stop = min(int(last) + 1 if first and last else len(data), len(data))
                marks["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
                return self.say(206, data[start:stop], **marks)
            return self.say(200, data, **marks)

        def do_POST(self) -> None:
            bucket, _, query = self.parts()
            data = self.rfile.read(int(self.headers["Content-Length"]))
            file = root / bucket / query["name"]
            old = file.stat().st_mtime_ns if file.exists() else 0
            if query.get("ifGenerationMatch", str(old)) != str(old):
                return self.say(412, {"error": {"code": 412}})
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            return self.say(200, self.about(bucket, query["name"]))

        def do_DELETE(self) -> None:
            bucket, name, _ = self.parts()
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                (root / bucket / name).unlink()
            self.say(204)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@contextlib.contextmanager
def stand_in(root: Path, patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Inside, gs://BUCKET is <root>/BUCKET. Tensorstore reads its address once a process: one
    stand-in serves all tests of a session."""
    server = _server(root)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    patch.setattr(Bucket, "root", str(root))
    from etils.epath import backend
    from orbax.checkpoint._src.path import gcs_utils

    plain = SimpleNamespace(hierarchical_namespace_enabled=False)
    patch.setattr(gcs_utils, "get_bucket", lambda name: plain)
    backend.fsspec_backend._get_filesystem.cache_clear()
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    Bucket.clear_instance_cache()
    try:
        yield root
    finally:
        server.shutdown()
        server.server_close()
