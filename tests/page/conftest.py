"""Servers and a browser for the tests of the page: Debian's Chromium, which can reach 127.0.0.1 alone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.serve.models import parser, segmenter

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which(os.environ.get("CHROMIUM", "chromium"))
TIMEOUT = 60_000  # ms: the machine may be busy
ARGUMENTS = (
    "--no-sandbox",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
)


class Server:
    """`fastuper serve` in a process of its own, with a folder for its temporary files and a working folder.

    Attributes:
        address: the page's.
        temporary: the folder that TMPDIR names.
        process: the process; its standard error goes to `errors`.
    """

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.temporary, self.work, self.errors = folder / "tmp", folder / "work", folder / "errors.txt"
        self.temporary.mkdir()
        self.work.mkdir()
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fastuper", "serve", *map(str, arguments), "--port", "0", "--device", "cpu"],
                cwd=self.work,
                env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(self.temporary), "HOME": str(self.work)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def address(self) -> str:
        """The page's address, once it answers."""
        if not hasattr(self, "_address"):
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            found = re.fullmatch(r"the page is at (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\n", line)
            assert found, line + self.errors.read_text()
            self._address = found[1]
        return self._address

    def interrupt(self) -> None:
        """Interrupt the process as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    def wait(self) -> int:
        """Return the exit status of the interrupted process."""
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Start both servers at once: most of the time of a start is imports."""
    models = tmp_path_factory.mktemp("models")
    started = {
        "demo": Server(tmp_path_factory.mktemp("demo"), "--max-pixels", 300_000),
        "own": Server(tmp_path_factory.mktemp("own"), segmenter(models / "tiny", 300), parser(models / "parser")),
    }
    yield started
    for server in started.values():
        server.process.kill()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, "Chromium is missing: apt-get install chromium"
    expect.set_options(timeout=TIMEOUT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@contextmanager
def watched_page(browser: Browser, address: str) -> Iterator[Page]:
    """Yield a new page, in a session of its own, that asks for nothing but the server, and in which no script fails."""
    elsewhere: list[str] = []
    faults: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 760})
    page = context.new_page()
    host = urlsplit(address).netloc

    def note(url: str) -> None:
        if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).netloc != host:
            elsewhere.append(url)

    page.on("request", lambda request: note(request.url))
    page.on("websocket", lambda socket: note(socket.url.replace("ws", "http", 1)))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Security Policy" in message.text else None)
    page.set_default_timeout(TIMEOUT)
    page.goto(address)
    page.wait_for_selector("#viewer .empty")
    yield page
    context.close()
    assert elsewhere == []
    assert faults == []


@pytest.fixture
def open_page(browser: Browser, servers: dict[str, Server]) -> Iterator[Callable[[str], Page]]:
    """Return a function that opens a page of a server, by its name."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(watched_page(browser, servers[name].address))
