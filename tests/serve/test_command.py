"""`fastuper serve`: what keeps it from starting, one line each."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastuper.cli import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def line(result: Result) -> str:
    """Return the one line that a command which could not start has printed."""
    assert result.exit_code == 2, result.output
    (text,) = result.output.splitlines()
    return text


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        text = line(run("--port", port))
    assert text == f"fastuper: cannot listen on 127.0.0.1, port {port}: Address already in use; give another --port"


def test_the_port_is_closed_while_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def load(*_: object) -> None:
        socket.create_connection(("127.0.0.1", port), timeout=5)

    monkeypatch.setattr("fastuper.serve.server.Models", load)
    assert isinstance(run("--port", port).exception, ConnectionRefusedError)


def test_an_unknown_host() -> None:
    assert line(run("--host", "no such host")).startswith("fastuper: --host no such host: ")


def test_a_missing_model(tmp_path: Path) -> None:
    text = line(run(tmp_path / "absent.pth", "--port", 0))
    assert text.startswith(f"fastuper: cannot load the model {tmp_path / 'absent.pth'}: ")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastuper.serve.server.find_spec", lambda name: None if name == "gradio" else name)
    assert line(run()) == "fastuper: the page needs gradio: pip install 'fastuper[serve]'"


def test_an_unknown_device() -> None:
    assert line(run("--port", 0, "--device", "toaster")).startswith("fastuper: --device toaster cannot be used: ")
