"""The page of `fastuper serve` in Chromium."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect
from typer.testing import CliRunner

from fastuper.cli import app
from fastuper.scenes.dataset import ID2LABEL, PALETTE, scene
from tests.page.conftest import ROOT, Server

OpenPage = Callable[[str], Page]


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "street 62.png"
    scene(62, (192, 256))[0].save(path)
    return path


@pytest.fixture(scope="module")
def segmented(street: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the files that `fastuper segment` writes of the photo."""
    output = tmp_path_factory.mktemp("segmented")
    arguments = ["segment", str(street), "--output", str(output), "--device", "cpu"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    return output


def upload(page: Page, path: Path) -> None:
    page.set_input_files("#photo input[type=file]", path)


def wait_for_result(page: Page, name: str) -> None:
    expect(page.locator("#viewer figcaption")).to_contain_text(name)


def canvas_pixels(page: Page) -> np.ndarray:
    """Return what the canvas shows, (H, W, 3)."""
    address = page.evaluate("document.querySelector('#viewer canvas').toDataURL('image/png')")
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def point_at(page: Page, row: int, column: int, labels: np.ndarray) -> None:
    """Move the pointer to a pixel of the photo."""
    box = page.locator("#viewer canvas").bounding_box()
    assert box is not None
    height, width = labels.shape
    page.mouse.move(box["x"] + (column + 0.5) / width * box["width"], box["y"] + (row + 0.5) / height * box["height"])


def test_a_photo_becomes_classes_to_point_at_and_files(open_page: OpenPage, street: Path, segmented: Path) -> None:
    page = open_page("demo")
    upload(page, street)
    wait_for_result(page, "street 62.png, 256 x 192 pixels")
    labels = np.asarray(Image.open(segmented / "street 62_labels.png"))

    # The list: the classes of the record, largest first.
    shares = json.loads((segmented / "results.jsonl").read_text())["shares"]
    assert page.locator("#viewer .classes .name").all_text_contents() == [each["name"] for each in shares]
    texts = page.locator("#viewer .classes .share").all_text_contents()
    assert texts[0] == f"{shares[0]['share']:.1%}".replace("%", " %")

    # Pointing at a pixel names its class and its share.
    hover = page.locator("#viewer .hover")
    for each, text in zip(shares[:4], texts, strict=False):
        rows, columns = np.nonzero(labels == each["class"])
        middle = len(rows) // 2
        point_at(page, rows[middle], columns[middle], labels)
        expect(hover).to_have_text(f"{each['name']} {text}")
        expect(page.locator("#viewer .classes li.active .name")).to_have_text(each["name"])
    page.mouse.move(2, 2)
    expect(hover).to_be_hidden()

    # The colours are the palette's at the slider's opacity; a hidden class shows the photo.
    with Image.open(street) as photo:
        pixels = np.asarray(photo.convert("RGB").resize((256, 192))).astype(float)
    colours = PALETTE[labels].astype(float)
    shown = canvas_pixels(page)
    assert shown.shape == pixels.shape
    assert np.abs(shown - (0.45 * pixels + 0.55 * colours)).mean() < 3  # the photo on the page is a JPEG
    largest = shares[0]["name"]
    page.locator("#viewer .classes label", has_text=largest).locator("input").uncheck()
    page.mouse.move(2, 2)
    hidden = labels == shares[0]["class"]
    shown = canvas_pixels(page)
    assert np.abs(shown - pixels)[hidden].mean() < 3
    assert np.abs(shown - colours)[~hidden].mean() < np.abs(pixels - colours)[~hidden].mean()
    page.get_by_role("button", name="Hide all").click()
    assert np.abs(canvas_pixels(page) - pixels).mean() < 3
    page.get_by_role("button", name="Show all").click()
    page.locator("#viewer input[type=range]").fill("100")
    page.mouse.move(2, 2)
    assert np.abs(canvas_pixels(page) - colours).mean() < 1

    # The files are those of `fastuper segment`, byte for byte.
    for ending in ("labels.png", "overlay.jpg"):
        with page.expect_download() as download:
            page.locator(f"#viewer .download[data-file='{ending}']").click()
        assert download.value.suggested_filename == f"street 62_{ending}"
        assert Path(download.value.path()).read_bytes() == (segmented / f"street 62_{ending}").read_bytes()

    # Without a photo there is no result.
    page.get_by_label("Remove Image").click()
    expect(page.locator("#viewer .empty")).to_be_visible()


def test_the_endpoint_gives_the_same_files(servers: dict[str, Server], street: Path, segmented: Path) -> None:
    address = f"{servers['demo'].address}/api/photo?name=street%2062.png"
    with urllib.request.urlopen(urllib.request.Request(address, street.read_bytes())) as answer:
        result = json.load(answer)
    for ending, place in result["files"].items():
        with urllib.request.urlopen(place) as answer:
            assert answer.read() == (segmented / f"street 62_{ending}").read_bytes()


def test_a_broken_file_gets_one_line_and_the_page_goes_on(open_page: OpenPage, street: Path, tmp_path: Path) -> None:
    page = open_page("demo")
    error = page.locator("#viewer .error")
    broken = tmp_path / "broken.png"
    broken.write_bytes(street.read_bytes()[:2000])
    upload(page, broken)
    expect(error).to_have_text(re.compile(r"^broken\.png: cannot be decoded \(.*\); the file is truncated or damaged$"))
    page.get_by_label("Remove Image").click()
    large = tmp_path / "large.png"
    Image.new("1", (600, 501)).save(large)
    upload(page, large)
    expect(error).to_contain_text("large.png: 600 x 501 = 300,600 pixels is over the limit of 300,000")
    page.get_by_label("Remove Image").click()
    upload(page, street)
    wait_for_result(page, "street 62.png")
    expect(error).to_have_count(0)


def test_an_example(open_page: OpenPage) -> None:
    page = open_page("demo")
    page.locator("button.gallery-item").first.click()
    wait_for_result(page, "scene-5.png, 512 x 384 pixels")
    assert set(page.locator("#viewer .classes .name").all_text_contents()) <= set(ID2LABEL.values())


def test_a_picture_of_the_camera(open_page: OpenPage) -> None:
    page = open_page("own")
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#photo video').videoWidth > 0")
    page.get_by_label("capture photo").click()
    expect(page.locator("#viewer canvas")).to_be_visible()


def test_two_visitors_at_once(open_page: OpenPage, tmp_path: Path) -> None:
    pages = [open_page("demo"), open_page("demo")]
    expected = []
    for number, page in enumerate(pages):
        path = tmp_path / f"visitor {number}.png"
        scene(100 + number, (192, 256))[0].save(path)
        assert CliRunner().invoke(app, ["segment", str(path), "-o", str(tmp_path / "out")]).exit_code == 0
        expected.append(tmp_path / "out" / f"visitor {number}_labels.png")
        page.set_input_files("#photo input[type=file]", path)  # both are on their way before either is waited for
    for number, page in enumerate(pages):
        wait_for_result(page, f"visitor {number}.png")
        address = page.locator(".download[data-file='labels.png']").get_attribute("href")
        answer = page.request.get(page.url.rstrip("/") + str(address))
        assert answer.body() == expected[number].read_bytes()


def test_models_to_choose_from_and_five_panels(open_page: OpenPage, street: Path) -> None:
    page = open_page("own")
    photographs = page.get_by_text("Photographs from scikit-image")
    expect(photographs).to_be_visible()
    upload(page, street)
    wait_for_result(page, "street 62.png")
    with Image.open(io.BytesIO(_download(page, "labels.png"))) as labels:
        assert labels.mode == "I;16"  # 300 classes
    names = page.locator("#viewer .classes .name").all_text_contents()
    assert all(re.fullmatch(r"thing \d+", name) for name in names)

    page.locator("#model input").click()
    page.get_by_role("option", name=re.compile("parser$")).click()
    expect(page.locator("#viewer .tabs button")).to_have_text(
        ["All panels", "Objects", "Parts", "Materials", "Textures"]
    )
    expect(page.locator("#viewer .scene")).to_contain_text(re.compile(r"Scene: \w+ \d+\.\d %, \w+ \d+\.\d %"))
    panels = page.locator("#viewer .panels")
    expect(panels).to_be_visible()
    page.wait_for_function("document.querySelector('#viewer .panels').naturalWidth > 600")
    for title, known in (("Objects", {"no object", "table", "lamp"}), ("Textures", {"banded", "dotted"})):
        page.get_by_role("tab", name=title).click()
        found = page.locator("#viewer .classes .name").all_text_contents()
        assert found
        assert set(found) <= known
    report = json.loads(_download(page, "parsing.json"))
    assert (report["photo"], report["width"], report["height"]) == ("street 62.png", 256, 192)


def _download(page: Page, ending: str) -> bytes:
    address = page.locator(f".download[data-file='{ending}']").get_attribute("href")
    return page.request.get(page.url.rstrip("/") + str(address)).body()


def test_the_queue_is_bounded(servers: dict[str, Server], street: Path) -> None:
    def post(_: int) -> int | str:
        request = urllib.request.Request(f"{servers['demo'].address}/api/photo", street.read_bytes())
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return json.load(error)["error"]

    with ThreadPoolExecutor(30) as threads:
        answers = list(threads.map(post, range(30)))
    assert set(answers) == {200, "the queue is full (8 photos wait): try again in a moment"}
    assert answers.count(200) >= 9


def test_only_uploaded_photos_are_read(servers: dict[str, Server]) -> None:
    """A program names a file, or an address, where the page names an upload."""
    address = f"{servers['demo'].address}/gradio_api"
    with urllib.request.urlopen(f"{servers['demo'].address}/config") as answer:
        (show,) = (each for each in json.load(answer)["dependencies"] if len(each["inputs"]) == 2)
    inside = next(servers["demo"].temporary.iterdir())
    for number, path in enumerate(
        ("/etc/passwd", f"{inside}/../../secret", "http://127.0.0.1:9/x", "file:///etc/passwd")
    ):
        message = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, "demo"], "fn_index": show["id"]}
        body = json.dumps(message | {"session_hash": f"visitor{number}"}).encode()
        urllib.request.urlopen(
            urllib.request.Request(f"{address}/queue/join", body, {"Content-Type": "application/json"})
        ).close()
        with urllib.request.urlopen(f"{address}/queue/data?session_hash=visitor{number}") as events:
            end = next(line for line in events if b"process_completed" in line)
        message = json.loads(end.removeprefix(b"data: "))
        assert message["output"]["error"] == "this is no uploaded photo: upload the file"
    for path in ("/etc/passwd", f"{inside}/../../secret", f"{ROOT}/README.md", "file:///etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/file={urllib.parse.quote(path)}")


def test_a_client_that_leaves_is_no_failure(servers: dict[str, Server]) -> None:
    """The last test sees that the server has printed nothing."""
    place = urllib.parse.urlsplit(servers["demo"].address)
    form = b"Content-Type: multipart/form-data; boundary=x\r\n"
    start = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    for path, header, body in (("/api/photo", b"", b"a"), ("/gradio_api/upload", form, start)):
        with socket.create_connection((str(place.hostname), place.port)) as client:
            head = f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 9999\r\n"
            client.sendall(head.encode() + header + b"\r\n" + body)
            time.sleep(0.2)


def test_ctrl_c_ends_the_page_and_leaves_nothing(servers: dict[str, Server]) -> None:
    for server in servers.values():
        (temporary,) = server.temporary.iterdir()  # one folder
        assert temporary.name.startswith(".fastuper-")
        server.interrupt()
    for server in servers.values():
        assert server.wait() == 0
        assert list(server.temporary.iterdir()) == []
        assert [path for path in server.work.rglob("*") if path.is_file()] == []
        assert server.errors.read_text() == ""
