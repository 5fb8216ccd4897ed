"""Draws the picture of the page in docs/: `python -m tests.page.screenshot`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from fastuper.scenes.dataset import scene
from tests.page.conftest import ARGUMENTS, CHROMIUM, ROOT, Server

COLOURS = 128
"""Of the picture: it must stay small."""


def draw(path: Path) -> None:
    """Write a picture of the page with the result of a drawn scene."""
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        photo = folder / "street.png"
        scene(62, (512, 683))[0].save(photo)
        server = Server(folder)
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
            page = browser.new_page(viewport={"width": 1280, "height": 660})
            page.goto(server.address)
            page.set_input_files("#photo input[type=file]", photo)
            page.wait_for_selector("#viewer canvas")
            box = page.locator("#viewer canvas").bounding_box()
            assert box is not None
            page.mouse.move(box["x"] + 0.57 * box["width"], box["y"] + 0.55 * box["height"])
            page.wait_for_timeout(500)
            page.screenshot(path=path)
            browser.close()
        finally:
            server.stop()
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


if __name__ == "__main__":
    draw(ROOT / "docs/serve.png")
