"""The JSON endpoint: the command's files, bad input, the bounds of the queue, sizes and the temporary folder."""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from typer.testing import CliRunner

from fastuper.cli import app as commands
from fastuper.scenes.dataset import ID2LABEL, load_model, scene
from fastuper.serve import files
from fastuper.serve.app import POLICY, Guard, build_app
from fastuper.serve.files import ResultFiles, Uploads, size_limit, temporary_folder
from fastuper.serve.models import Models
from fastuper.serve.service import Queue, RefusedError, Service, plain_name


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "results").mkdir()
    models = Models([], torch.device("cpu"), "auto", print)
    return Service(models, ResultFiles(folder / "results"), max_pixels=60_000, waiting=2)


@pytest.fixture
def client(service: Service, tmp_path: Path) -> Iterator[TestClient]:
    uploads = Uploads(tmp_path)
    app = Guard(build_app(service, tmp_path, uploads), uploads, loopback=True, largest=size_limit(service.max_pixels))
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        yield client
    assert list(tmp_path.iterdir()) == []  # the request's body was removed


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "my straße.png"
    scene(7, (96, 128))[0].save(path)
    return path


def test_the_files_are_those_of_the_command(client: TestClient, photo: Path, tmp_path_factory) -> None:
    answer = client.post("/api/photo", params={"name": photo.name}, content=photo.read_bytes())
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == POLICY
    result = answer.json()
    assert {key: result[key] for key in ("photo", "width", "height", "model", "scene")} == {
        "photo": photo.name,
        "width": 128,
        "height": 96,
        "model": "demo",
        "scene": None,
    }

    output = tmp_path_factory.mktemp("results")
    assert CliRunner().invoke(commands, ["segment", str(photo), "--output", str(output)]).exit_code == 0
    assert list(result["files"]) == ["labels.png", "overlay.jpg"]
    for ending, address in result["files"].items():
        downloaded = client.get(address)
        assert downloaded.content == (output / f"{photo.stem}_{ending}").read_bytes()
        assert f"{photo.stem}_{ending}" in re.sub("%C3%9F", "ß", address.replace("%20", " "))
    record = json.loads((output / "results.jsonl").read_text())
    classes = result["layers"]["class"]
    assert [{name: each[name] for name in ("class", "name", "share")} for each in classes] == record["shares"]
    assert all(re.fullmatch("#[0-9a-f]{6}", each["colour"]) for each in classes)
    labels = np.asarray(Image.open(output / f"{photo.stem}_labels.png"))
    model, processor = load_model()
    (expected,) = model.segment(**processor(Image.open(photo), return_tensors="pt"), target_sizes=[(96, 128)])
    assert np.array_equal(labels, expected.numpy())
    assert {each["name"] for each in classes} == {ID2LABEL[index] for index in np.unique(labels)}


def test_models_are_listed(client: TestClient) -> None:
    assert client.get("/api/models").json() == {"demo": "segment"}


@pytest.mark.parametrize(
    ("content", "query", "status", "message"),
    [
        (b"", {}, 400, "the request has no body: send the photo's file, as curl --data-binary @photo.jpg does"),
        (b"not a picture", {"name": "a/b/x.jpg"}, 400, r"x\.jpg: is not an image in a format that Pillow can read.*"),
        (b"\xff\xd8\xff\xe0 cut", {"name": "x.jpg"}, 400, r"x\.jpg: cannot be decoded.*truncated or damaged"),
        (b"x", {"model": "other"}, 404, "there is no model other here; known are demo"),
        (b"x" * (480_000 + (1 << 24) + 1), {}, 413, "the photo's file has more than 17,257,216 bytes"),
    ],
)
def test_bad_requests_get_one_line(client: TestClient, content, query, status, message) -> None:
    answer = client.post("/api/photo", params=query, content=content)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert re.fullmatch(message, answer.json()["error"])


def test_bodies_are_bounded(client: TestClient) -> None:
    answer = client.post("/api/photo", content=iter([b"a", b"b"]))  # in chunks
    assert answer.status_code == 411
    assert answer.json() == {"error": "the request does not state the length of its body: send Content-Length"}
    answer = client.post("/gradio_api/queue/join", content=b"x" * ((1 << 20) + 1))
    assert (answer.status_code, answer.text) == (413, "the request has more than 1,048,576 bytes\n")


def test_photos_that_arrive_at_once_are_bounded(tmp_path: Path) -> None:
    """Two photos of the largest size may arrive at once, a third is refused, and one that has left makes room."""
    left, answers = asyncio.Event(), []

    async def app(*_: object) -> None:
        await left.wait()

    async def note(message: dict[str, object]) -> None:
        answers.append(message)

    async def visit() -> None:
        guard = Guard(app, Uploads(tmp_path), loopback=False, largest=100)
        scope = {"type": "http", "path": "/gradio_api/upload", "headers": [(b"content-length", b"100")]}
        both = [asyncio.create_task(guard(scope, None, note)) for _ in range(2)]
        await asyncio.sleep(0)
        await guard(scope, None, note)
        assert [message.get("status") for message in answers] == [503, None]
        left.set()
        await asyncio.gather(*both)
        await guard(scope, None, note)
        assert len(answers) == 2

    asyncio.run(visit())


def test_photos_over_the_limit_are_refused(client: TestClient, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("large") / "large.png"
    Image.new("RGB", (301, 200)).save(path)
    answer = client.post("/api/photo", params={"name": "large.png"}, content=path.read_bytes())
    assert answer.status_code == 400
    assert "301 x 200 = 60,200 pixels is over the limit of 60,000" in answer.json()["error"]


def test_no_other_file_is_served(client: TestClient, photo: Path) -> None:
    result = client.post("/api/photo", content=photo.read_bytes()).json()
    key = result["files"]["labels.png"].split("/")[-2]
    for path in (f"{key}/absent.png", f"{key}/..%2f..%2fsecret", "other/photo_labels.png", f"{key}/%00"):
        assert client.get(f"/results/{path}").status_code == 404


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        ({"host": "127.0.0.1:7860"}, "/api/models", 200),
        ({"host": "localhost"}, "/api/models", 200),
        ({"host": "[::1]:7860", "origin": "http://[::1]:7860"}, "/api/models", 200),
        ({"host": "evil.example:7860"}, "/api/models", 403),
        ({"host": "127.0.0.1:7860", "origin": "http://evil.example"}, "/api/models", 403),
        ({"host": "127.0.0.1:7860"}, "/gradio_api/file=https://evil.example/x", 403),
        ({"host": "127.0.0.1:7860"}, "/gradio_api/proxy=https://evil.example/x", 403),
    ],
)
def test_requests_that_lead_elsewhere_are_refused(client: TestClient, headers, path, status) -> None:
    assert client.get(path, headers=headers).status_code == status


def test_names_have_no_folders() -> None:
    names = ["photo.jpg", "C:\\photos\\a.png", "../../etc/passwd", "", "..", "a\nb\0.png"]
    assert [plain_name(name) for name in names] == ["photo.jpg", "a.png", "passwd", "photo", "photo", "a_b_.png"]


def test_the_queue_is_bounded_and_in_order() -> None:
    queue, release, done = Queue(1), threading.Event(), []

    async def visit() -> None:
        first = asyncio.create_task(queue.run(release.wait))
        second = asyncio.create_task(queue.run(lambda: done.append("second")))
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match=r"the queue is full \(1 photos wait\): try again in a moment") as error:
            await queue.run(lambda: done.append("third"))
        assert error.value.status == 503
        second.cancel()  # its visitor has gone: the place is free again
        await asyncio.sleep(0)
        fourth = asyncio.create_task(queue.run(lambda: done.append("fourth")))
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(first, fourth)
        assert await queue.run(lambda: 5) == 5

    asyncio.run(visit())
    queue.close()
    assert done == ["fourth"]


def test_a_failure_frees_its_place() -> None:
    queue = Queue(0)

    def fail() -> None:
        raise ValueError("no")

    async def visit() -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                await queue.run(fail)
            await asyncio.sleep(0.01)

    asyncio.run(visit())
    queue.close()


def test_old_results_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "KEPT_RESULTS", 3)
    results = ResultFiles(tmp_path)
    keys = []
    for _ in range(5):
        with results.new() as (key, folder):
            (folder / "a.txt").touch()
        keys.append(key)
    assert [results.path(key, "a.txt") is not None for key in keys] == [False, False, True, True, True]
    assert len(list(tmp_path.iterdir())) == 3
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + files.KEPT_SECONDS + 1)
    results.sweep()
    assert list(tmp_path.iterdir()) == []

    def fill_the_disk() -> None:
        with results.new() as (_, folder):
            (folder / "half").touch()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill_the_disk()
    assert list(tmp_path.iterdir()) == []


def test_results_and_uploads_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "KEPT_BYTES", 250)
    (tmp_path / "results").mkdir()
    results = ResultFiles(tmp_path / "results")
    keys = []
    for _ in range(4):
        with results.new() as (key, folder):
            (folder / "a").write_bytes(bytes(100))
        keys.append(key)
    results.sweep()
    assert [results.path(key, "a") is not None for key in keys] == [False, False, True, True]

    folder = tmp_path / "uploads"
    names = ("example/a", "b/oldest", "c/middle", "d/newest", "old/e", "arriving", "failed")
    ages = (9999, 30, 20, 10, files.KEPT_SECONDS + 1, 5, files.UNFINISHED_SECONDS + 1)
    uploads = None
    for name, age in zip(names, ages, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(1 if name == "arriving" else 100))
        os.utime(folder / name, (time.time() - age,) * 2)
        uploads = uploads or Uploads(folder)  # what is there at first stays
    assert uploads is not None
    uploads.sweep()
    left = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert left == {"example", "example/a", "c", "c/middle", "d", "d/newest", "arriving"}


def test_the_temporary_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as folder:
        assert folder.parent == tmp_path
        assert os.stat(folder).st_mode & 0o777 == 0o700
        assert tempfile.gettempdir() == str(folder)
        (folder / "file").touch()
    assert list(tmp_path.iterdir()) == []
    assert tempfile.gettempdir() == str(tmp_path)
