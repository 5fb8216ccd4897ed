"""Draws the picture of the page in docs/: `python -m tests.page.screenshot`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from fastuper.scenes.dataset import ID2LABEL, PALETTE, scene
from tests.page.conftest import ARGUMENTS, CHROMIUM, ROOT, Server

SCENE = 5
POINTED = next(index for index, name in ID2LABEL.items() if name == "car")
"""The class under the pointer."""


def draw(path: Path) -> None:
    """Write a picture of the page with the result of a drawn scene."""
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        photo = folder / "street.png"
        drawn, labels = scene(SCENE, (512, 683))
        drawn.save(photo)
        rows, columns = np.nonzero(np.asarray(labels) == POINTED)
        row, column = rows[len(rows) // 2], columns[len(columns) // 2]
        server = Server(folder)
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
            page = browser.new_page(viewport={"width": 1280, "height": 660})
            page.goto(server.address)
            page.set_input_files("#photo input[type=file]", photo)
            page.wait_for_selector("#viewer canvas")
            box = page.locator("#viewer canvas").bounding_box()
            assert box is not None
            page.mouse.move(box["x"] + column / 683 * box["width"], box["y"] + row / 512 * box["height"])
            page.wait_for_timeout(500)
            page.screenshot(path=path)
            browser.close()
        finally:
            server.interrupt()
            server.wait()
    with Image.open(path) as picture:
        full = picture.convert("RGB")
    # A small picture: 256 colours, among them white and those of the classes.
    most = np.array(full.quantize(255 - len(PALETTE)).getpalette(), np.uint8)
    palette = Image.new("P", (1, 1))
    palette.putpalette([255, 255, 255, *PALETTE.ravel(), *most])
    full.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    draw(ROOT / "docs/serve.png")
