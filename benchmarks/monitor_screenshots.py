"""Pictures of the web monitor in light, in dark and on a phone, as docs/img has them.

    dbtrain train configs/demo/dit.yaml --run runs/dit --set training.steps=900 --set checkpoints.every=100 \\
        --set logging.every=10 --set resources.cpus=0.5 &
    dbtrain monitor runs/dit --web --samples 5 &
    kill -9 ...                                                 # a worker; the page names its process
    python benchmarks/monitor_screenshots.py 'http://127.0.0.1:8090/?token=...' docs/img

Needs Chromium and the Python package playwright.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

VIEWS = {
    "light": {"viewport": {"width": 1180, "height": 1480}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1180, "height": 1480}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 1150}, "color_scheme": "light", "device_scale_factor": 1.5},
}
SETTLED_MS = 1500
COLOURS = 96


def main() -> None:
    """Write monitor-light.png, monitor-dark.png and monitor-phone.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="as `dbtrain monitor --web` printed it")
    parser.add_argument("folder", type=Path)
    wanted = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, headless=True, args=["--no-sandbox"])
        for name, view in VIEWS.items():
            page = browser.new_context(**view).new_page()
            page.goto(wanted.url)
            page.locator("#blocks tbody tr").first.wait_for()
            page.wait_for_timeout(SETTLED_MS)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            picture.quantize(COLOURS, dither=Image.Dither.NONE).save(
                wanted.folder / f"monitor-{name}.png", optimize=True
            )
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
