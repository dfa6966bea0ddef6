"""A web monitor as a test has it, and how it is asked."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dbtrain.monitoring.web.address import address_of
from dbtrain.monitoring.web.server import MonitorServer, monitor_server
from dbtrain.run_directory import RunDirectory

TOKEN = "only-for-the-tests_0123"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@contextmanager
def serving(run: RunDirectory, samples: float | None = None) -> Iterator[MonitorServer]:
    """A monitor that answers on a free port of the loopback address."""
    with monitor_server(run, address_of("127.0.0.1", 0, TOKEN), samples=samples) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(
    server: MonitorServer, path: str, method: str = "GET", token: str | None = TOKEN, **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    """An answer and its body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    query = "" if token is None else f"{'&' if '?' in path else '?'}token={token}"
    try:
        connection.request(method, path + query, headers=headers)
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()
