from __future__ import annotations

import gzip
import http.client
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_runs import start_run
from web_monitor import EVIL, TOKEN, ask, serving

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.monitoring.web import server as server_module
from dbtrain.monitoring.web.address import address_of
from dbtrain.monitoring.web.server import MonitorServer
from dbtrain.run_directory import RunDirectory

PATHS = [
    "/",
    "/state",
    "/page.js",
    "/page.css",
    "/samples.png",
    "/no-such-page",
    "/%2e%2e/config.yaml",
    "/../config.yaml",
]


@contextmanager
def connected(server: MonitorServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20) as connection:
        yield connection


def said(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("token", [None, "", "forged", TOKEN[:-1], TOKEN + "x", f"{TOKEN}&token={TOKEN}", "%C3%A4%FF"])
def test_without_the_token_nothing_is_told(server: MonitorServer, path: str, token: str | None) -> None:
    answer, body = ask(server, path, token=token)
    assert answer.status == 403
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert body.decode().startswith("This monitor needs its token: open the whole address")
    assert TOKEN not in body.decode()


def test_the_token_is_needed_by_other_methods_too(server: MonitorServer) -> None:
    for method in ("HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        refused, _ = ask(server, "/state", method, token="forged")
        known, body = ask(server, "/state", method)
        assert (refused.status, known.status, known.headers["Allow"]) == (403, 405, "GET"), method
        assert (body == b"") == (method == "HEAD")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:9999", 200),  # the other end of a tunnel
        ("127.0.0.1", 200),
        ("[::1]:8090", 200),
        ("evil.example", 403),
        ("localhost.evil.example:8090", 403),
        ("192.0.2.1", 403),
        ("", 403),
    ],
)
def test_names_of_other_machines_are_refused(server: MonitorServer, host: str, status: int) -> None:
    answer, body = ask(server, "/state", Host=host)
    assert answer.status == status
    if status == 403:
        assert b"does not answer under that name" in body


def test_every_answer_forbids_what_the_page_does_not_need(server: MonitorServer) -> None:
    for path, token in (("/", TOKEN), ("/state", TOKEN), ("/nothing", TOKEN), ("/", "forged")):
        headers = ask(server, path, token=token)[0].headers
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert {value for name, value in policy.items() if name.endswith("-src")} == {"'none'", "'self'"}
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert "Python" not in headers["Server"]


def test_the_page_needs_nothing_from_elsewhere(server: MonitorServer) -> None:
    page = ask(server, "/")[1].decode()
    links = [part.split('"')[0] for name in ("src", "href") for part in page.split(f' {name}="')[1:]]
    assert len(links) == 6
    for link in links:
        answer, body = ask(server, f"/{link}", token=None)  # they carry it
        assert answer.status == 200
        assert len(body) > 100
        if link.startswith("icon"):
            body = body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"//" not in body.replace(b"http://www.w3.org/2000/svg", b"").replace(b"\n//", b"").replace(b"  //", b"")
        assert b"innerHTML" not in body
    assert ask(server, "/page.html")[0].status == 404  # the one without a token in it


def test_no_path_leads_to_a_file(server: MonitorServer, troubled: RunDirectory) -> None:
    for path in (
        "/config.yaml",
        "/../server.py",
        "/page/page.js",
        "//etc/passwd",
        "/page.js/..",
        "/state/",
        "/samples.png",
    ):
        assert ask(server, path)[0].status == 404, path


def test_the_state_is_strict_json_and_markup_stays_text(server: MonitorServer) -> None:
    def refuse(text: str) -> float:
        raise AssertionError(text)

    answer, body = ask(server, "/state")
    state = json.loads(body, parse_constant=refuse)
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert state["run"]["driver"] == f"process 7 on {EVIL}"
    block = state["blocks"][1]
    assert (block["state"], block["restarts"], block["node"], block["reason"]) == ("stopped", 1, EVIL, EVIL)
    assert [(mark["kind"], mark["step"]) for mark in block["marks"]] == [("restart", 50)]
    assert block["losses"] == {"steps": [10, 20, 30, 40, 50], "values": [0.3, 0.15, None, 0.075, 0.06]}
    assert state["problem"] is None
    assert b"<script>alert" not in ask(server, "/")[1]


def test_what_is_new_shows_and_the_directory_stays_as_it_is(troubled: RunDirectory) -> None:
    home = troubled.storage.local_path
    assert home is not None
    with serving(troubled) as server:
        source = server.source
        source._until = 0.0
        before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
        assert json.loads(source.state())["blocks"][2]["step"] == 50
        ask(server, "/")
        assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before
        line = {"step": 60, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-3, "samples_per_second": 50.0, "checkpoint_step": 0}
        troubled.block(2).log_metrics(line)
        source._until = 0.0
        assert json.loads(ask(server, "/state")[1])["blocks"][2]["step"] == 60
        home.rename(home.with_name("gone"))
        source._until = 0.0
        state = json.loads(ask(server, "/state")[1])
        assert "not there any more" in state["problem"]
        assert state["blocks"][2]["step"] == 60


def test_long_answers_are_compressed_for_who_can_read_them(server: MonitorServer) -> None:
    answer, body = ask(server, "/state", **{"Accept-Encoding": "gzip, br"})
    assert answer.headers["Content-Encoding"] == "gzip"
    assert json.loads(gzip.decompress(body))["run"]["name"] == "small"


@pytest.mark.parametrize(
    "line", [b"nonsense", b"GET", b"GET / HTTP/9.9", b"BREW /?x HTTP/1.1", b"GET /" + b"a" * 70000]
)
def test_what_is_no_request_gets_a_plain_refusal(server: MonitorServer, line: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(line + b"\r\nHost: localhost\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = said(connection)
    assert b"<" not in answer
    assert b"200" not in answer.split(b"\r\n")[0]
    assert ask(server, "/state")[0].status == 200


def test_clients_that_go_away_leave_no_trace(
    server: MonitorServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(20):
        with connected(server) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(f"GET /state?token={TOKEN} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        # closed with a reset while the answer is under way
    with connected(server):
        pass
    with caplog.at_level(logging.DEBUG):
        assert ask(server, "/state")[0].status == 200
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_one_that_says_nothing_holds_up_nobody(troubled: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "CONNECTIONS", 2)
    with serving(troubled) as server, connected(server), connected(server) as silent:
        with connected(server) as third:
            assert said(third) == b""  # turned away
        silent.sendall(f"GET /state?token={TOKEN} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert b"200 OK" in said(silent)
        deadline = time.monotonic() + 60
        while not _answered(server):  # its place is free again in a moment
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _answered(server: MonitorServer) -> bool:
    try:
        return ask(server, "/state")[0].status == 200
    except (http.client.HTTPException, OSError):
        return False


def test_many_tabs_read_the_directory_once(troubled: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(troubled) as server:
        reads: list[int] = []
        read = server.source._looker.look
        monkeypatch.setattr(server.source._looker, "look", lambda: (reads.append(1), read())[1])
        monkeypatch.setattr(server.source, "_clock", lambda: 5.0)
        threads = [threading.Thread(target=ask, args=(server, "/state")) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(reads) == 1


def test_a_directory_that_vanishes_and_comes_back_as_another_run(
    troubled: RunDirectory, small_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_FRESH", 0.0)
    path = tmp_path / "run"
    with serving(troubled) as server:
        assert json.loads(ask(server, "/state")[1])["problem"] is None
        path.rename(tmp_path / "away")
        state = json.loads(ask(server, "/state")[1])
        assert ("not there" in state["problem"], len(state["blocks"])) == (True, 3)
        path.mkdir()
        assert "not a run directory" in json.loads(ask(server, "/state")[1])["problem"]
        start_run(small_config(blocks={"count": 2}), path)
        state = json.loads(ask(server, "/state")[1])
        assert (state["problem"], len(state["blocks"]), state["run"]["state"]) == (None, 2, "new")


def test_the_picture_that_sample_left_is_shown(troubled: RunDirectory) -> None:
    png = b"\x89PNG\r\n\x1a\n" + b"as good as any"
    troubled.storage.write_atomic("samples/samples.png", png)
    with serving(troubled) as server:
        assert json.loads(ask(server, "/state")[1])["samples"] == {"status": "kept", "picture": True, "version": 1}
        answer, body = ask(server, "/samples.png?version=1")
        assert (answer.headers["Content-Type"], body) == ("image/png", png)
    troubled.storage.write_atomic("samples/samples.png", b"<script>")
    with serving(troubled) as server:
        assert json.loads(ask(server, "/state")[1])["samples"]["status"] == "off"


def test_a_port_that_is_in_use_is_named(server: MonitorServer, troubled: RunDirectory) -> None:
    port = server.server_address[1]
    with (
        pytest.raises(UserError, match=rf"--port = {port}: is in use \(choose another --port, or 0"),
        server_module.monitor_server(troubled, address_of("127.0.0.1", port, None)),
    ):
        pass


@pytest.mark.parametrize(
    ("host", "token", "problem"),
    [
        ("0.0.0.0", None, "needs a token of your own"),
        ("::", None, "needs a token of your own"),
        ("127.0.0.1", "short", "16 to 200 letters"),
        ("127.0.0.1", "a" * 20 + '"><b>', "16 to 200 letters"),
        ("0.0.0.0", "", "16 to 200 letters"),
        ("no such host", None, "is no address"),
        ("", None, "is no address"),
    ],
)
def test_addresses_that_are_refused(host: str, token: str | None, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as refused:
        address_of(host, 0, token)
    if token:
        assert token not in str(refused.value)


def test_an_address_of_another_machine_is_refused(troubled: RunDirectory) -> None:
    with (
        pytest.raises(UserError, match=r"--bind = '192\.0\.2\.1': is no address of this machine"),
        server_module.monitor_server(troubled, address_of("192.0.2.1", 0, "t" * 20)),
    ):
        pass


def test_links_name_the_host(small_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    first, second = (address_of("localhost", 0, None) for _ in range(2))
    assert first.token != second.token
    assert len(first.token) >= 32
    assert first.url(81) == f"http://localhost:81/?token={first.token}"
    assert address_of("::1", 0, "t" * 20).url(81) == f"http://[::1]:81/?token={'t' * 20}"
    everywhere: Any = address_of("0.0.0.0", 0, "t" * 20)
    assert f"//{socket.gethostname()}:81/" in everywhere.url(81)
    assert everywhere.answers_to("any.name.of.this.machine")
    run = start_run(small_config(), tmp_path / "run")
    with serving(run) as server:
        assert server.url.startswith(f"http://127.0.0.1:{server.server_address[1]}/?token={TOKEN}")
