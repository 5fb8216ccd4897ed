"""`fastuper segment` and its record: `--skip-existing`, runs that are killed, photos that cannot be read."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import Result

from fastuper import UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.data.overlay import class_shares
from fastuper.inference.results import RESULTS, content_of, identity, model_digest
from tests.end_to_end.common import NAMES
from tests.end_to_end.test_segment import copy_of, file_names, read_labels, run, save, start


def picture(seed: int, height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / RESULTS).read_text("ascii").splitlines()]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results"


def test_lines_and_photos_that_need_no_work(model: Path, output: Path, tmp_path: Path) -> None:
    one, two = (save(tmp_path / folder / "photo.png", picture(seed)) for seed, folder in enumerate(("one", "two")))
    bad = tmp_path / "bad.png"
    bad.write_text("no photo")

    def again(*photos: Path, checkpoint: Path = model, **options: str) -> Result:
        given = [part for name, value in options.items() for part in (f"--{name}", value)]
        return run(*photos, "-m", checkpoint, "-o", output, "--skip-existing", *given)

    assert "2 of 3 photos segmented, results" in again(one, two, bad).stdout
    first, second, failed = lines(output)
    network = UperNetForSemanticSegmentation.from_pretrained(model)
    assert first["model"] == model_digest(network, UperNetImageProcessor.from_pretrained(model))
    assert first["options"] == {"dtype": "float32"}
    assert (first["photo"], second["photo"], failed["photo"]) == (identity(one), identity(two), identity(bad))
    assert first["sha256"] == content_of(one).sha256
    assert (first["width"], first["height"], first["error"]) == (40, 30, None)
    labels = read_labels(output / "photo_labels.png")
    shares = {each["class"]: each["share"] for each in first["shares"]}
    assert [each["name"] for each in first["shares"]] == [NAMES[index] for index in shares]
    assert shares == {index: share for index, share in enumerate(class_shares(labels, 6)) if share}
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert (failed["outputs"], failed["shares"]) == ({}, [])
    assert failed["error"].startswith(f"{bad}: is not an image")

    before = {name: (output / name).stat().st_mtime_ns for name in file_names(output)}
    result = again(two, bad, one)  # in another order
    assert result.exit_code == 1
    assert "0 of 3 photos segmented, 2 already there" in result.stdout
    assert {name: (output / name).stat().st_mtime_ns for name in file_names(output)} == before

    moved = copy_of(model, tmp_path / "moved")
    assert "0 of 1 photos segmented, 1 already there" in again(one, checkpoint=moved).stdout
    assert "1 of 1 photos segmented, results" in again(one, dtype="bfloat16").stdout
    settings = json.loads((moved / "preprocessor_config.json").read_text())
    (moved / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    assert "1 of 1 photos segmented, results" in again(one, checkpoint=moved).stdout
    with torch.no_grad():
        network.decode_head.classifier.bias[0] += 1
    network.save_pretrained(moved)
    assert "1 of 1 photos segmented, results" in again(two, checkpoint=moved).stdout
    save(two, picture(7, 20, 20))
    assert "1 of 1 photos segmented, results" in again(two, checkpoint=moved).stdout
    assert read_labels(output / "photo-2_labels.png").shape == (20, 20)


def test_another_photo_of_the_same_name(model: Path, output: Path, tmp_path: Path) -> None:
    one, two = save(tmp_path / "1" / "a.png", picture(0)), save(tmp_path / "2" / "a.png", picture(0, 20, 60))
    foreign = output / "a-2_labels.png"
    assert run(one, "-m", model, "-o", output).exit_code == 0
    foreign.write_text("no line names this file")
    result = run(two, "-m", model, "-o", output, "--skip-existing")
    assert f"(those of {one} are replaced)" in result.stdout
    assert read_labels(output / "a_labels.png").shape == (20, 60)
    assert run(one, two, "-m", model, "-o", output, "--skip-existing").exit_code == 0
    assert read_labels(output / "a_labels.png").shape == (20, 60)
    assert read_labels(output / "a-3_labels.png").shape == (30, 40)
    assert foreign.read_text() == "no line names this file"


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_second_run_after_a_kill_redoes_what_is_missing(model: Path, output: Path, tmp_path: Path) -> None:
    photos = [save(tmp_path / f"{name}.png", picture(seed)) for seed, name in enumerate("abc")]
    code = (
        "import os, signal; from PIL import Image; from fastuper.cli import main\n"
        "save = Image.Image.save\n"
        "def stop(self, path, **options):\n"
        "    save(self, path, **options)\n"
        "    stop.calls += 1\n"
        "    if stop.calls == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "stop.calls = 0; Image.Image.save = stop; main()"
    )
    process = start("segment", *photos, "-m", model, "-o", output, "--device", "cpu", code=code)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert [line["photo"] for line in lines(output)] == [identity(photos[0])]
    assert (output / "b_labels.png").exists()  # it is whole, but the overlay and the line are missing
    with open(output / RESULTS, "ab") as file:
        file.write(b'{"photo": "torn')
    result = run(*photos, "-m", model, "-o", output, "--skip-existing")
    assert result.exit_code == 0
    assert "2 of 3 photos segmented, 1 already there" in result.stdout
    assert [line["photo"] for line in lines(output)] == list(map(identity, photos))
    names = [name for name in file_names(output) if not name.startswith(".")]
    assert names == [f"{name}_{kind}" for name in "abc" for kind in ("labels.png", "overlay.jpg")]


@contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Obey the permissions of files also where the tests run as root, which Linux's capabilities exempt."""
    if sys.platform != "linux" or os.getuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0)), ctypes.create_string_buffer(24)
    assert libc.capget(header, before) == 0
    effective, *others = struct.unpack("6I", before.raw)
    override, read = 1 << 1, 1 << 2
    after = struct.pack("6I", effective & ~(override | read), *others)
    assert libc.capset(header, ctypes.create_string_buffer(after)) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@pytest.mark.skipif(os.name != "posix", reason="FIFOs, links and permissions are POSIX's")
def test_photos_that_cannot_be_read_do_not_stop_the_others(
    model: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path / "good.png", picture(0))
    folder = tmp_path / "folder"
    save(folder / "inside.png", picture(1))
    secret, hidden = save(tmp_path / "secret.png", picture(2)), save(tmp_path / "locked" / "hidden.png", picture(3))
    for path in (folder, tmp_path):
        os.symlink("nowhere.png", path / "dangling.png")
        os.symlink("loop.png", path / "loop.png")
        os.mkfifo(path / "fifo.png")
    dash = save(tmp_path / "-dash.png", picture(4))
    long = tmp_path / ("d" * 200) / ("e" * 200) / ("f" * 200) / "gone.png"
    long.parent.mkdir(parents=True)
    escape = tmp_path / "\x1b[31mred\u202e\udcff.png"
    bad = [secret, hidden, tmp_path / "dangling.png", tmp_path / "loop.png", tmp_path / "fifo.png"]
    bad += [tmp_path / "gone.png", tmp_path / "locked", long, tmp_path / ("g" * 300 + ".png"), escape]
    secret.chmod(0)
    hidden.parent.chmod(0)
    given = [dash.name, "", *bad, good, folder, good]
    monkeypatch.chdir(tmp_path)
    with as_an_ordinary_user():
        result = run("-m", model, "-o", output, "--", *given)
    hidden.parent.chmod(0o755)
    printed, complaints = result.stdout, result.stderr
    assert result.exit_code == 1, complaints
    assert "3 of 19 photos segmented" in printed
    stems = ("-dash", "good", "inside")
    assert file_names(output) == [f"{stem}_{kind}" for stem in stems for kind in ("labels.png", "overlay.jpg")]
    failures = [line for line in complaints.splitlines() if line.startswith("  ")]
    assert len(failures) == 16
    assert [line["error"] for line in lines(output)].count(None) == 3
    assert not {"\x1b", "\u202e"} & set(printed + complaints)
    assert sum("gone.png: no such file" in line for line in failures) == 2
    assert max(map(len, failures)) < 400
    assert any(line.startswith("  '': an empty name") for line in failures)


def test_output_folders_that_cannot_be_used(model: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", picture(0))
    os.symlink("loop", tmp_path / "loop")
    os.symlink("nowhere/deep", tmp_path / "dangling")
    long = "x" * 300
    circle, file = "a link that leads nowhere or in a circle", "is a file, not a folder"
    faults = {"loop": circle, "dangling": circle, "photo.png": file, "photo.png/in": "Not a directory"}
    faults |= {"loop/in": "symbolic links"}
    for name, fault in {**faults, long: "too long", f"{long}/{long}": "too long", "": ""}.items():
        result = run(photo, "-m", model, "-o", tmp_path / name if name else "")
        assert result.exit_code == 2, (name, result.output)
        assert len(result.stderr.splitlines()) == 1
        assert fault in result.stderr
        assert "output folder" in result.stderr
    (tmp_path / "out" / RESULTS).mkdir(parents=True)
    result = run(photo, "-m", model, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == f"fastuper: {tmp_path / 'out' / RESULTS}: Is a directory\n"
