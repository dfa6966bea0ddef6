"""Answers a browser: the page, its scripts, and the state of the run. Reads the run directory, and nothing else.

Whoever asks has to know the token, whatever is asked for; the page carries it in its address. It is kept in no cookie:
cookies go to every port of a host, so other programs of this machine would get it too.
"""

from __future__ import annotations

import gzip
import hmac
import logging
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, cast
from urllib.parse import parse_qs

from dbtrain.monitoring.following import Looker
from dbtrain.monitoring.web.address import Address
from dbtrain.monitoring.web.samples import Gallery, gallery_of
from dbtrain.monitoring.web.state import encode_state
from dbtrain.run_directory import RunDirectory

CONNECTIONS = 64
"""Answered at a time; more are turned away."""
_FRESH = 0.9
"""Seconds for which the state of a run is told again: many tabs cost no more than one."""
_PATIENCE = 20
"""Seconds for which a client may keep us waiting."""
_LONG = 1400
"""Bytes above which compressing pays."""
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_log = logging.getLogger(__name__)


def serve(
    run: RunDirectory, address: Address, *, samples: float | None = None, ready: Callable[[str], None] | None = None
) -> None:
    """Answer until Ctrl-C (KeyboardInterrupt), which is the way to end it.

    Args:
        address: where to listen, and the token that every request has to have.
        samples: seconds between two looks for new checkpoints to draw samples from; none are drawn without it.
        ready: called with the page's address, token included, once it is answered.

    Raises:
        UserError: the port is in use, or the address is none of this machine's.
    """
    with monitor_server(run, address, samples=samples) as server:
        try:
            if ready is not None:
                ready(server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            return


@contextmanager
def monitor_server(run: RunDirectory, address: Address, *, samples: float | None = None) -> Iterator[MonitorServer]:
    """A server that listens and does not answer yet; at the end it is closed. Raises as `serve` does."""
    with gallery_of(run, samples) as gallery:
        with address.refused():
            server = MonitorServer(Source(run, gallery), address)
        with server:
            yield server


class Source:
    """What is told of the run; asked by many threads."""

    def __init__(self, run: RunDirectory, gallery: Gallery, clock: Callable[[], float] = time.monotonic):
        self.gallery = gallery
        self._looker = Looker(run)
        self._clock = clock
        self._lock = threading.Lock()
        self._state = b""
        self._until = -1.0

    def state(self) -> bytes:
        """The run's state as JSON, at most about a second old."""
        with self._lock:
            if self._clock() >= self._until:
                self._state = self._read()
                self._until = self._clock() + _FRESH
            return self._state

    def _read(self) -> bytes:
        problem = self._looker.look()  # what was read before is still worth showing
        view = self._looker.view
        samples = self.gallery.look(view)
        return encode_state(view, self._looker.run.config, time.time(), samples=samples, problem=problem)


class MonitorServer(ThreadingHTTPServer):
    """Listens at `address` and answers from `source`."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(self, source: Source, address: Address):
        self.source = source
        self.address = address
        self.address_family = address.family
        self._places = threading.BoundedSemaphore(CONNECTIONS)
        self.files = {
            f"/{file.name}": (_TYPES[file.name.rpartition(".")[2]], file.read_bytes())
            for file in files(__package__).joinpath("page").iterdir()
            if file.name.rpartition(".")[2] in _TYPES
        }
        # The token has no character that means anything in HTML.
        kind, page = self.files.pop("/page.html")
        self.files["/"] = (kind, page.replace(b"TOKEN", address.token.encode()))
        super().__init__((address.ip, address.port), _Handler)

    @property
    def url(self) -> str:
        """The page's address, token included."""
        return self.address.url(self.server_address[1])

    def server_bind(self) -> None:
        """As in the base class, but without asking the name service who we are."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.address.host, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own; turned away where too many are being answered."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The thread of one request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Called within an `except`; a client that goes away is no error of ours."""
        _log.exception("an answer of the web monitor failed")


class _Handler(BaseHTTPRequestHandler):
    timeout = _PATIENCE

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # it went away, or took too long
            self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except OSError:
            return

    def do_GET(self) -> None:
        server = cast("MonitorServer", self.server)
        path, _, query = self.path.partition("?")
        if not self._let_in(server, query):
            return
        if self.command != "GET":
            self._say(HTTPStatus.METHOD_NOT_ALLOWED, "This monitor answers GET alone.", {"Allow": "GET"})
        elif path == "/state":
            self._answer(HTTPStatus.OK, "application/json", server.source.state())
        elif path == "/samples.png" and (png := server.source.gallery.png) is not None:
            self._answer(HTTPStatus.OK, "image/png", png)
        elif path in server.files:
            self._answer(HTTPStatus.OK, *server.files[path])
        else:
            self._say(HTTPStatus.NOT_FOUND, "There is no such page here.")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET  # noqa: N815

    def _let_in(self, server: MonitorServer, query: str) -> bool:
        """Whether the request names us and has the token; it is answered if not."""
        if not server.address.answers_to(self.headers.get("Host", "")):
            # A page elsewhere may have its own name point here, to read what only this machine may.
            self._say(HTTPStatus.FORBIDDEN, "This monitor does not answer under that name; use localhost.")
            return False
        try:
            given = parse_qs(query, max_num_fields=16).get("token", [""])
        except ValueError:
            given = [""]
        # Bytes, since text that is not ASCII would be refused with an exception.
        if len(given) == 1 and hmac.compare_digest(given[0].encode(errors="replace"), server.address.token.encode()):
            return True
        self._say(
            HTTPStatus.FORBIDDEN,
            "This monitor needs its token: open the whole address that `dbtrain monitor` printed, ?token=... included.",
        )
        return False

    def _say(self, status: HTTPStatus, sentence: str, more: dict[str, str] | None = None) -> None:
        self._answer(status, "text/plain", (sentence + "\n").encode(), more)

    def _answer(self, status: HTTPStatus, kind: str, body: bytes, more: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": kind if kind.startswith("image/p") else f"{kind}; charset=utf-8"}
        accepted = self.headers.get("Accept-Encoding", "") if hasattr(self, "headers") else ""
        if len(body) > _LONG and kind != "image/png" and "gzip" in accepted:
            body = gzip.compress(body, 5)
            headers["Content-Encoding"] = "gzip"
        self.send_response(status)
        for name, value in {**headers, **_HEADERS, **(more or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses by itself, such as a malformed request."""
        self.close_connection = True
        self._say(HTTPStatus(code), HTTPStatus(code).phrase + ".")

    def version_string(self) -> str:
        return "dbtrain"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: their addresses hold the token."""
