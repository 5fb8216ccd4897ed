"""Standard streams of the commands: closed, full, without a reader, and with names that have control characters."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from fastuper.cli import streams
from tests.end_to_end.test_segment import copy_of, environment, file_names, save

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a POSIX shell closes and redirects streams")

FULL = "fastuper: cannot write to standard output: No space left on device\n"
HOW = {
    "2>&-": (0, ""),
    ">&-": (0, ""),
    "<&-": (0, ""),
    ">&- 2>&- <&-": (0, ""),
    "> /dev/full": (1, FULL),
    "2> /dev/full": (0, ""),
    "> /dev/full 2>&-": (1, ""),
    "| true": (0, ""),
    "| head -c 1": (0, ""),
}


def in_shell(how: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `fastuper ARGUMENTS HOW`."""
    command = ["bash", "-c", f'set -o pipefail; "$0" -m fastuper "$@" {how}', sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


QUICK = ("2>&-", "> /dev/full", "| true")


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=() if how in QUICK else pytest.mark.exhaustive) for how in HOW]
)
def test_streams_that_are_closed_or_full(how: str) -> None:
    status, complaints = HOW[how]
    done = in_shell(how, "--version")
    assert (done.returncode, done.stderr) == (status, complaints)


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=() if how == ">&- 2>&- <&-" else pytest.mark.exhaustive) for how in HOW]
)
def test_the_photos_are_segmented_whatever_the_streams(how: str, model: Path, tmp_path: Path) -> None:
    status, complaints = HOW[how]
    photos = [save(tmp_path / f"{name}.png", np.zeros((20, 30, 3), np.uint8)) for name in "ab"]
    done = in_shell(how, "segment", *photos, "-m", model, "-o", tmp_path / "out", "--device", "cpu")
    assert (done.returncode, done.stderr) == (status, complaints)
    assert len(file_names(tmp_path / "out")) == 4


def test_a_command_that_does_not_exist_keeps_its_status() -> None:
    assert in_shell("> /dev/full", "segmnet").returncode == 2
    done = in_shell("", "segment", "--dtyp\x1b[2Je")
    assert done.returncode == 2
    assert r"--dtyp\x1b[2Je" in done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", ["segment", "evaluate", "train"])
def test_names_cannot_steer_the_terminal(command: str, model: Path, tmp_path: Path) -> None:
    """File names, class names and arguments, in reports, errors and the libraries' messages."""
    evil = "a\x1b]0;owned\x07\x1b[2J\u202e\x9b5m"
    checkpoint = copy_of(model, tmp_path / f"model{evil}")
    config = json.loads((checkpoint / "config.json").read_text())
    config["id2label"] = {index: f"\x1b[31m[red]{name}\r\x07" for index, name in config["id2label"].items()}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "preprocessor_config.json").unlink()  # a message names the model
    data = tmp_path / f"data{evil}"
    photo = save(data / "images" / f"{evil}.png", np.zeros((40, 50, 3), np.uint8))
    save(data / "labels" / f"{evil}.png", np.arange(2000, dtype=np.uint8).reshape(40, 50) % 6)
    (data / "classes.txt").write_text("\n".join(name[:-2] for name in config["id2label"].values()))
    arguments = {
        "segment": [photo, data, data / "gone", "-m", checkpoint, "-o", tmp_path / f"out{evil}", "--device", "cpu"],
        "evaluate": ["-d", data, "-m", checkpoint, "-o", tmp_path / f"out{evil}", "--device", "cpu"],
        "train": ["-d", data, "-m", checkpoint, "-o", tmp_path / f"out{evil}", "--steps", "1", "--crop", "32"],
    }
    done = in_shell("", command, *arguments[command])
    assert "Traceback" not in done.stderr
    printed = done.stdout + done.stderr
    assert not {letter for letter in printed if letter != "\n" and not letter.isprintable()}
    assert r"a\x1b]0;owned\x07\x1b[2J\u202e\x9b5m" in printed


# The streams themselves


class Raw(io.RawIOBase):
    """The bytes that reach a terminal or a file. Each write takes at most 5 bytes, or fails."""

    def __init__(self, terminal: bool = False, error: OSError | None = None) -> None:
        self.terminal = terminal
        self.error = error
        self.content = b""

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.terminal

    def write(self, data) -> int:
        if self.error is not None:
            raise self.error
        self.content += bytes(data[:5])
        return min(5, len(data))


def stream_over(raw: Raw, encoding: str = "utf-8") -> io.TextIOWrapper:
    return streams._safe(io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding))


@pytest.mark.parametrize("terminal", [False, True])
def test_control_characters_are_escaped(terminal: bool) -> None:
    raw = Raw(terminal)
    stream = stream_over(raw)
    print("photo\x1b[2J\t\r\n\u2028\udcff façade", file=stream, flush=True)
    assert raw.content == "photo\\x1b[2J\\t\\r\n\\u2028\\udcff façade\n".encode()


@pytest.mark.parametrize(("encoding", "expected"), [("latin-1", b"\xe7 \\u9053\n"), ("ascii", "ç 道\n".encode())])
def test_letters_that_the_encoding_lacks(encoding: str, expected: bytes) -> None:
    raw = Raw()
    print("ç 道", file=stream_over(raw, encoding), flush=True)
    assert raw.content == expected


def test_a_progress_bar_moves_on_a_terminal_only() -> None:
    raw = Raw(terminal=True)
    with tqdm(total=2, file=stream_over(raw), mininterval=0, desc="\x1b[31m") as bar:
        bar.update()
        bar.write("line\x1b[2J", file=stream_over(raw))
        bar.update()
    assert raw.content.count(b"\r") >= 3
    assert b"\\x1b[31m" in raw.content
    assert b"\x1b" not in raw.content
    log = Raw()
    print("\rname\x1b[A", file=stream_over(log), flush=True)
    assert log.content == rb"\rname\x1b[A" + b"\n"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(OSError(28, "No space left on device"), 1, FULL), (BrokenPipeError(32, "Broken pipe"), 0, ""), (None, 0, "")],
)
def test_the_status_at_the_end(error: OSError | None, status: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output, complaints = Raw(error=error), Raw()
    for name, raw in (("stdout", output), ("stderr", complaints)):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))
    monkeypatch.setattr(sys, "stdin", sys.stdin)
    standard = streams.Streams()
    for _ in range(3):
        print("a line", flush=True)
    for given, expected in ((0, status), (None, status or None), (2, 2), (130, 130)):
        with pytest.raises(SystemExit) as ended:
            standard.leave(given)
        assert ended.value.code == expected
    assert set(complaints.content.decode().splitlines(keepends=True)) == ({said} if said else set())
    assert output.content == (b"a line\n" * 3 if error is None else b"")
