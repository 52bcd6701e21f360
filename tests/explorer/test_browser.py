"""The explorer's page in a real browser."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer, write_pictures

from tessella.checkpoint import save_generator
from tessella.commands.explore import open_session
from tessella.explorer.server import serve
from tessella.generators.maskgit import MaskGIT

pytest.importorskip("starlette", reason="the page needs the extra ui")
pytest.importorskip("uvicorn", reason="the page needs the extra ui")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser and is not installed")

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# The pixels of the decoded picture.
PIXELS = """() => {
    const image = document.querySelector('#decoded img');
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    return Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data);
}"""
SLIDE = """(share) => {
    const slider = document.querySelector('#morph');
    slider.value = share;
    slider.dispatchEvent(new Event('input'));
}"""


def until(page: Any, holds: str) -> None:
    """Wait for a condition; the page's policy forbids the driver's own way, which evaluates text inside it."""
    deadline = time.monotonic() + 20
    while not page.evaluate(holds):
        assert time.monotonic() < deadline, holds
        page.wait_for_timeout(20)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a page with a small tokenizer and a masked generator."""
    folder = tmp_path_factory.mktemp("browsed")
    write_pictures(folder / "pictures", 12)
    tokenizer = tiny_tokenizer()
    tokenizer.save(folder / "tokenizer")
    torch.manual_seed(1)
    conditioner = {"name": "label", "num_classes": 2, "class_names": ["cat", "dog"]}
    generator = MaskGIT(tokenizer.token_space(16, 16), conditioner=conditioner, dim=16, num_layers=1, num_heads=2)
    save_generator(generator.eval(), tokenizer, folder / "generator")
    session = open_session(
        folder / "tokenizer", folder / "generator", data=f"folder:{folder / 'pictures'}", device="cpu"
    )
    told: list[str] = []
    served = threading.Thread(
        target=serve, args=(session,), kwargs={"host": "127.0.0.1", "port": 0, "ready": told.append}, daemon=True
    )
    served.start()
    for _ in range(200):
        if told:
            return told[0]
        time.sleep(0.05)
    raise AssertionError("the page was not served")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        flags = [*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        opened = driver.chromium.launch(executable_path=BROWSER, args=flags)
        yield opened
        opened.close()


@pytest.fixture(params=[(1400, 900), (390, 844)], ids=["wide", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    width, height = request.param
    opened = browser.new_page(viewport={"width": width, "height": height})
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.goto(address)
    opened.wait_for_selector("#decoded img")
    until(opened, "document.querySelector('#map-hint').textContent !== ''")
    yield opened
    assert [said for said in errors if "422" not in said] == []  # a refusal, which the page shows
    opened.close()


def changed(page: Any, act: Any) -> list[int]:
    """The decoded picture's new pixels, once ``act`` has changed them."""
    before = page.evaluate(PIXELS)
    act()
    deadline = time.monotonic() + 20
    while (after := page.evaluate(PIXELS)) == before:
        assert time.monotonic() < deadline, "the picture stayed as it was"
        page.wait_for_timeout(20)
    return list(after)


def point(page: Any, row: int, column: int, *, on: str = "#tokens canvas", size: int = 4) -> tuple[float, float]:
    """The middle of a token's cell on the screen."""
    page.locator(on).scroll_into_view_if_needed()
    box = page.locator(on).bounding_box()
    return box["x"] + box["width"] * (column + 0.5) / size, box["y"] + box["height"] * (row + 0.5) / size


def test_hover_click_and_replace(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
    page.mouse.move(*point(page, 1, 2))
    page.wait_for_selector("#code-body:not([hidden])")
    assert "code" in page.locator("#code-name").inner_text()
    assert page.locator("#patches img").count() >= 1
    first = page.evaluate(PIXELS)
    page.mouse.click(*point(page, 1, 2))
    until(page, "!document.querySelector('#put').disabled")
    far = page.locator("#neighbours button").last
    changed(page, far.click)
    assert changed(page, lambda: page.click("#undo")) == first


def test_by_hand_and_by_keyboard(page: Any) -> None:
    page.mouse.click(*point(page, 0, 0))
    page.fill("#by-hand", "124")
    page.locator("#by-hand").press("Tab")
    until(page, "document.querySelector('#code-name').textContent === 'code 124'")
    changed(page, lambda: page.click("#put"))
    page.fill("#by-hand", "125")
    page.locator("#by-hand").press("Tab")
    assert "codes are from 0 to 124" in page.locator("#message").inner_text()
    page.locator("#tokens canvas").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(100)
    page.fill("#by-hand", "3")
    page.locator("#by-hand").press("Tab")
    until(page, "document.querySelector('#code-name').textContent === 'code 3'")
    page.locator("#tokens canvas").focus()
    changed(page, lambda: page.keyboard.press("Enter"))


def test_paint_region_and_map(page: Any) -> None:
    box = page.locator("#map").bounding_box() if page.locator("#map").scroll_into_view_if_needed() is None else None
    page.mouse.click(box["x"] + 12, box["y"] + 12)
    until(page, "document.querySelector('#code-name').textContent !== ''")
    page.click("[data-mode=paint]")

    def paint() -> None:
        page.mouse.move(*point(page, 0, 0))
        page.mouse.down()
        for column in range(1, 4):
            page.mouse.move(*point(page, 0, column))
        page.mouse.up()

    changed(page, paint)
    page.click("[data-mode=region]")
    drag(page, (2, 0), (3, 3))
    changed(page, lambda: page.click("#fill-code"))
    changed(page, lambda: page.click("#reset"))


def drag(page: Any, start: tuple[int, int], end: tuple[int, int]) -> None:
    page.mouse.move(*point(page, *start))
    page.mouse.down()
    page.mouse.move(*point(page, *end))
    page.mouse.up()


def test_sample_fill_and_morph(page: Any) -> None:
    page.select_option("#class", "1")
    changed(page, lambda: page.click("#sample"))
    page.click("#keep")
    page.fill("#seed", "5")
    other = changed(page, lambda: page.click("#sample"))
    changed(page, lambda: page.evaluate(SLIDE, 60))
    assert changed(page, lambda: page.evaluate(SLIDE, 0)) == other
    page.click("[data-mode=region]")
    drag(page, (0, 0), (1, 3))
    changed(page, lambda: page.click("#splice"))
    changed(page, lambda: page.click("#inpaint"))


def test_a_file_is_opened_and_a_wrong_one_is_said(page: Any, tmp_path: Path) -> None:
    write_pictures(tmp_path, 2, size=40)
    changed(page, lambda: page.set_input_files("#file", str(tmp_path / "class_1" / "001.png")))
    (tmp_path / "note.png").write_text("no picture")
    page.set_input_files("#file", str(tmp_path / "note.png"))
    until(page, "document.querySelector('#message').classList.contains('wrong')")
    assert "note.png" in page.locator("#message").inner_text()
