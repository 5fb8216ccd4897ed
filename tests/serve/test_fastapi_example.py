"""examples/serve_fastapi.py on the loopback: 100 requests from 8 threads, and bad input."""

from __future__ import annotations

import importlib.util
import io
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import uvicorn
from PIL import Image

from fastuper.scenes.dataset import scene
from tests.serve.models import segmenter

EXAMPLE = Path(__file__).parents[2] / "examples/serve_fastapi.py"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = segmenter(tmp_path_factory.mktemp("model") / "tiny", 9)
    spec = importlib.util.spec_from_file_location("serve_fastapi", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL", str(folder))
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def address(example: ModuleType) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(example.app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/segment"
    server.should_exit = True
    thread.join()


def post(address: str, content: bytes) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(address, content), timeout=60) as answer:
        return answer.read()


def test_a_hundred_requests_from_eight_threads(example: ModuleType, address: str) -> None:
    photos, expected = [], []
    for seed in range(5):
        scene(seed, (24 + seed, 40))[0].save(file := io.BytesIO(), "PNG")
        photos.append(file.getvalue())
        expected.append(np.asarray(Image.open(io.BytesIO(example.segment(photos[-1])))))
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda number: post(address, photos[number % 5]), range(100)))
    for number, answer in enumerate(answers):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer))), expected[number % 5])
    assert len({labels.tobytes() for labels in expected}) == 5


@pytest.mark.parametrize(("content", "status"), [(b"no photo", 400), (b"x" * 20_000_001, 413)])
def test_bad_photos(address: str, content: bytes, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        post(address, content)
    assert error.value.code == status
