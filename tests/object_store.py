"""A small object store of this machine, which pyarrow's own S3 client reads: a folder behind HTTP."""

from __future__ import annotations

import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest


class ObjectStore:
    """Serves every file below `folder` as an object of the bucket `bucket`; keeps count of what was read."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        self.sent = Counter[str]()
        """Bytes sent of each object, by its key."""
        self.requests = 0
        self.refusals = 0
        """So many of the next requests for the content of a shard are answered with "try again later"; pyarrow's client
        asks some 30 times, for 6 seconds, before it gives up."""
        self.forbidden = False
        self.gate = threading.Event()
        """While it is cleared, shards wait to be sent, but for the next `passes` of them."""
        self.gate.set()
        self.passes = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        # The client takes its credentials from the environment, and workers inherit it.
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def uri(self, key: str) -> str:
        """What `Storage.open` takes for the objects below `key`."""
        port = self._server.server_address[1]
        return f"s3://bucket/{key}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"

    def close(self) -> None:
        """No more answers."""
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()

    def refuses(self) -> bool:
        """Whether the request in hand is to be refused; counts it."""
        with self._lock:
            self.refusals -= 1
            return self.refusals >= 0

    def wait(self) -> None:
        """Hold the shard in hand back, unless it may pass."""
        with self._lock:
            self.passes -= 1
            passes = self.passes >= 0
        if not passes:
            self.gate.wait()

    def count(self, key: str, size: int) -> None:
        """Remember what was sent."""
        with self._lock:
            self.sent[key] += size


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ObjectStore

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        if "list-type" in parse_qs(asked.query):
            self._list(parse_qs(asked.query).get("prefix", [""])[0])
        else:
            self._answer(with_content=True)

    def log_message(self, format: str, *arguments: object) -> None:
        self.store.requests += 1

    def _answer(self, with_content: bool) -> None:
        store, key = self.store, unquote(urlsplit(self.path).path).removeprefix("/bucket/")
        path = store.folder / key
        if store.forbidden:
            return self._send(403, b"")
        if not path.is_file():
            return self._send(404, b"")
        if with_content and key.endswith(".arrow"):
            if store.refuses():
                return self._send(503, b"")
            store.wait()
        content, status, extra = path.read_bytes(), 200, {}
        if (asked := self.headers.get("Range")) is not None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            whole, start = len(content), int(first)
            content, status = content[start : int(last) + 1 if last else whole], 206
            extra["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{whole}"
        if with_content:
            store.count(key, len(content))
        return self._send(status, content, with_content, extra)

    def _list(self, prefix: str) -> None:
        root = self.store.folder
        keys = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        found = [key for key in keys if key.startswith(prefix)]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{(root / key).stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in found
        )
        body = (
            f'<?xml version="1.0"?><ListBucketResult><Name>bucket</Name><Prefix>{escape(prefix)}</Prefix>'
            f"<KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        )
        self._send(200, body.encode())

    def _send(self, status: int, body: bytes, with_body: bool = True, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)
