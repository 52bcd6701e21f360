"""The picture of docs/explorer.md: the page of a run in a browser without a window.

    tessella quickstart --out quickstart
    python tools/explorer_screenshot.py quickstart/run quickstart/generator docs/explorer.png

It needs the extra `ui`, the package playwright, and Chromium on the path.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import threading
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tessella.commands.explore import open_session
from tessella.explorer.server import serve

WIDTH, HEIGHT = 1240, 1000


def main() -> None:
    """Open the page, look at a token, and write what is seen."""
    run, generator, out = map(Path, sys.argv[1:])
    told: list[str] = []
    session = open_session(run, generator, device="cpu")
    settings = {"host": "127.0.0.1", "port": 0, "ready": told.append}
    threading.Thread(target=serve, args=(session,), kwargs=settings, daemon=True).start()
    while not told:
        time.sleep(0.1)
    with sync_playwright() as driver:
        flags = ["--disable-gpu", "--no-first-run", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(told[0])
        page.locator("#examples button").nth(3).click()
        page.wait_for_timeout(1500)
        box = page.locator("#tokens canvas").bounding_box()
        assert box is not None
        page.mouse.click(box["x"] + 0.4 * box["width"], box["y"] + 0.55 * box["height"])
        page.wait_for_timeout(1000)
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        picture.quantize(128).save(out, optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
