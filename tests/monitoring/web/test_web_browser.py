"""The page in a real browser: of a live run on Ray workers, one of which is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from web_monitor import EVIL, TOKEN, serving

from dbtrain.config import RunConfig
from dbtrain.monitoring.run_view import RunReader
from dbtrain.monitoring.web.server import MonitorServer
from dbtrain.run_directory import PLAN, RunDirectory

playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET = ["--disable-component-update", "--disable-sync", "--disable-default-apps"]
MARKUP = "<img src=x onerror=alert(1)>"
"""Of a folder's name."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=[*OPTIONS, *QUIET])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab of a dark desktop that has complained of nothing at the end."""
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": 1240, "height": 1000}, color_scheme="dark")
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.on("console", lambda message: complaints.extend([message.text] * (message.type in ("error", "warning"))))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    yield page
    context.close()
    assert complaints == []


def test_a_live_run_whose_worker_is_killed(page: Any, small_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    long = small_config(
        model={"width": 64, "mlp_width": 256}, training={"steps": 1_000_000}, checkpoints={"every": 100, "keep": 2}
    )
    config.write_text(long.to_yaml())
    where = tmp_path / MARKUP
    command = [sys.executable, "-m", "dbtrain.cli.main", "train", str(config), "--run", str(where), "--backend", "ray"]
    with (tmp_path / "output").open("wb") as output:
        driver = subprocess.Popen(command, stdout=output, stderr=output, process_group=0)
    try:
        _until(page, lambda: driver.poll() is not None or (where / PLAN).exists())
        run = RunDirectory.open(where)
        with serving(run) as server:
            _watch(page, server, run)
    finally:
        driver.terminate()
        code = driver.wait(90)
    assert code == 1, (tmp_path / "output").read_text()  # stopped


def _watch(page: Any, server: MonitorServer, run: RunDirectory) -> None:
    page.goto(server.url)
    row = page.locator("tr[data-block='1']")
    _until(page, lambda: page.locator("#chart path.curve").count() == 3)
    curve = page.locator("#chart path.curve").first.get_attribute("d")
    _until(page, lambda: page.locator("#chart path.curve").first.get_attribute("d") != curve)
    row.locator("[data-label=checkpoint]").get_by_text("ago").wait_for()  # has saved
    assert MARKUP in page.locator("#about").inner_text()

    pid = RunReader(run).read().blocks[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    row.locator(".state.restarting").wait_for()
    assert "died" in row.locator(".reason").inner_text()
    assert page.locator("#run-state").inner_text() == "running"
    row.locator(".state.running").wait_for()
    page.locator("#chart path.mark.restart").wait_for()
    assert row.locator("[data-label=restarts]").inner_text() == "1"
    assert page.locator("#notices li.trouble").count() >= 1
    assert page.locator("tr[data-block='0'] [data-label=restarts]").inner_text() == "0"

    page.locator("#chart").hover(position={"x": 300, "y": 100})
    assert page.locator(".readout").inner_text().startswith("step ")
    _shoot(page, run, "dark")
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.locator("[data-curve=rates]").click()
    page.locator("[data-scale=linear]").click()
    _shoot(page, run, "light")
    page.set_viewport_size({"width": 390, "height": 844})
    _until(page, lambda: page.evaluate("document.querySelector('#chart svg').clientWidth") < 390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    _shoot(page, run, "phone")
    page.goto("about:blank")  # it would complain of a server that is gone


def _shoot(page: Any, run: RunDirectory, name: str) -> None:
    """A screenshot beside the run; empty ones would be small."""
    assert run.storage.local_path is not None
    assert len(page.screenshot(path=run.storage.local_path.parent / f"{name}.png", full_page=True)) > 20_000


def _until(page: Any, condition: Callable[[], bool]) -> None:
    """Polls from here: the page lets nobody evaluate strings."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        page.wait_for_timeout(100)


def test_markup_stays_text_wherever_it_stands(page: Any, server: MonitorServer) -> None:
    def crafted(route: Any) -> None:
        """A run's name cannot be markup, as its configuration is checked; this one is, as are all other texts."""
        state = route.fetch().json()
        state["run"].update(name=EVIL, uri=EVIL, state=EVIL, family=EVIL, backend=EVIL)
        state["samples"] = {"status": "drawn", "steps": [1], "at": 0, "version": 1, "texts": [[EVIL, EVIL]]}
        state["blocks"][0]["marks"] = [{"kind": EVIL, "step": 30, "time": 0, "text": EVIL}]
        state["blocks"][0]["device"] = EVIL
        route.fulfill(body=json.dumps(state), content_type="application/json")

    page.route("**/state?*", crafted)
    page.goto(server.url)
    page.locator("#notices li").first.wait_for()
    assert page.locator("h1").inner_text() == EVIL
    assert EVIL in page.locator("#about").inner_text()
    assert page.locator("#notices").inner_text().count(EVIL) >= 3
    assert page.locator("pre").inner_text() == EVIL + EVIL
    assert page.locator("script:not([src]), img[src=x]").count() == 0
    page.unroute_all(behavior="wait")
    page.goto("about:blank")


def test_without_the_token_the_browser_gets_a_sentence(browser: Any, server: MonitorServer) -> None:
    context = browser.new_context()
    try:
        page = context.new_page()
        answer = page.goto(server.url.replace(TOKEN, "forged-" + TOKEN))
        assert answer.status == 403
        assert "needs its token" in page.inner_text("body")
    finally:
        context.close()


def test_the_page_says_when_the_monitor_is_gone_and_when_its_token_has_changed(
    browser: Any, troubled: RunDirectory
) -> None:
    context = browser.new_context()
    try:
        page = context.new_page()
        with serving(troubled) as server:
            port = server.server_address[1]
            page.goto(server.url)
            page.locator("tr[data-block='2']").wait_for()
            page.route("**/state?*", lambda route: route.fulfill(status=403, body="no"))
            page.get_by_text("The token is no longer right").wait_for()
        with socket.create_server(("127.0.0.1", port)):
            pass  # it is free again
        page.unroute_all(behavior="wait")
        page.evaluate("ask()")
        page.get_by_text("The monitor does not answer.").wait_for()
        assert page.locator("tr[data-block='2']").count() == 1  # what was shown stays
    finally:
        context.close()
