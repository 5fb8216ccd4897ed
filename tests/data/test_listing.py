"""`list_images`: what a folder holds, and what in it cannot be read."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fastuper.data.listing import list_images, normal_name

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need a permission on Windows; it has no FIFOs")


def test_files_folders_and_links_to_them(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", ".hidden.png", "notes.txt", "no suffix"):
        (tmp_path / name).touch()
    for name in ("sub", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "link.png").symlink_to("a.png")
    (tmp_path / "self").symlink_to(".")
    found = list_images(tmp_path, (".png", ".jpg"))
    assert [path.name for path in found.images] == ["a.png", "b.JPG", "link.png"]
    assert [path.name for path in found.folders] == ["self", "sub"]
    assert (found.problems, found.others) == ({}, 2)


def test_what_cannot_be_read_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("good.png", "locked.png", "notes.txt"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device.png").symlink_to("/dev/null")
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        # The tests may run as root, whom no permission stops.
        monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
        found = list_images(tmp_path, (".png",))
    assert [path.name for path in found.images] == ["good.png"]
    assert {path.name: reason for path, reason in found.problems.items()} == {
        "circle.png": "is a link that leads in a circle",
        "dangling": "is a link to nowhere, which does not exist",
        "device.png": "is a device, not a file",
        "locked.png": "no permission to read it",
        "pipe.png": "is a FIFO, not a file",
        "socket.png": "is a socket, not a file",
    }
    assert found.others == 2


def test_folder_that_cannot_be_listed_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list_images(tmp_path / "none", ()).problems == {tmp_path / "none": "No such file or directory"}
    (tmp_path / "a.png").touch()
    scandir = os.scandir

    class Failing:
        """Fails after the first entry, as a disk with a damaged block does."""

        def __init__(self, folder):
            self.scan = scandir(folder)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.scan.close()

        def __iter__(self):
            yield next(self.scan)
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "scandir", Failing)
    found = list_images(tmp_path, (".png",))
    assert found.problems == {tmp_path: "Input/output error"}
    assert found.images == [tmp_path / "a.png"]


def test_names_are_compared_in_one_form() -> None:
    assert normal_name("cafe\u0301.png") == normal_name("caf\u00e9.png") == "caf\u00e9.png"
    assert normal_name("\udcff") == "\udcff"  # a byte that is no UTF-8
