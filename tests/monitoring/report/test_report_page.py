from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from report_page import Page, assert_harmless
from small_families import MODELS
from small_runs import start_run, train_all

from dbtrain.config import RunConfig
from dbtrain.monitoring.report import charts
from dbtrain.monitoring.report.gather import gather
from dbtrain.monitoring.report.page import render
from dbtrain.run_directory import RunDirectory

FamilyConfig = Callable[..., RunConfig]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def _page(run: RunDirectory, baseline: RunDirectory | None = None) -> Page:
    page = Page(render(gather(run, baseline)).decode())
    assert_harmless(page)
    return page


@pytest.mark.parametrize("family", MODELS)
def test_every_family_has_a_page_before_anything_is_trained(
    family: str, family_config: FamilyConfig, tmp_path: Path
) -> None:
    config = family_config(family)
    run, baseline = start_run(config, tmp_path / "run"), start_run(config, tmp_path / "baseline", "end_to_end")
    page = _page(run, baseline)
    first, end = run.plan.blocks[2].layers
    assert page.rows("plan")["block 2"][0] == f"{first}–{end - 1}"
    assert f"· {family}" in page.words[""]
    assert ("classifies images" in page.words["samples"]) == (family == "vit")
    assert len(set(page.ids)) == len(page.ids)

    # Each block's own range is the second bar of its two: one follows the other, high noise to the left.
    axis = charts.noise_axis(run.plan.blocks)
    assert axis is not None
    bars = [(float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.-]+)" y="\d+" width="([\d.]+)"', axis)][1::2]
    assert len(bars) == 3
    for (x, width), (following, _) in pairwise(bars):
        assert x + width == pytest.approx(following, abs=0.3)
    assert charts.noise_axis(baseline.plan.blocks) is None


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_browser_shows_and_prints_it(family_config: FamilyConfig, tmp_path: Path) -> None:
    """Nothing is loaded, nothing is refused by the page's own policy, and a telephone shows it without scrolling."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    config = family_config("vit", training={"steps": 10}, logging={"every": 1})
    run = train_all(start_run(config, tmp_path / "run"))
    run.journal({"event": "run_started", "nodes": {}})
    crafted = "<script>document.title = 'hit'</script><img src=x onerror=\"document.title = 'hit'\">"
    run.journal({"event": "block_restarting", "block": 1, "attempt": 1, "step": 5, "reason": crafted})
    (tmp_path / "page.html").write_bytes(render(gather(run)))
    said: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: said.append(request.url))
        page.goto(f"file://{tmp_path}/page.html")
        assert said == [f"file://{tmp_path}/page.html"]
        assert page.title() == f"{config.name}: report"
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        # The style was not refused, and the picture has its size.
        assert page.evaluate("getComputedStyle(document.querySelector('.tiles')).display") == "grid"
        assert page.evaluate("document.querySelector('#losses svg').getBoundingClientRect().width") > 300
        assert page.pdf(format="A4").startswith(b"%PDF")
        browser.close()
