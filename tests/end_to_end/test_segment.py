"""`fastuper segment`: photographs, bad input of every kind, and a command that is stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import nn
from typer.testing import CliRunner, Result

import fastuper
from fastuper import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.cli import app
from fastuper.cli.common import in_columns
from fastuper.data.classes import class_palette
from fastuper.inference.results import RESULTS
from fastuper.scenes.dataset import PALETTE, scene
from tests.end_to_end.common import NAMES

try:
    import fcntl
    import pty
    import termios
except ImportError:  # not on Windows
    pty = None

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TRANSFORMERS = "import sys; sys.modules['transformers'] = None; from fastuper.cli import main; main()"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["segment", *map(str, arguments), "--device", "cpu"])


def heed_interrupts() -> None:
    """Restore the default of SIGINT: a child inherits that it is ignored, and Python leaves it so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def environment() -> dict[str, str]:
    """Return the environment in which a new process imports these packages."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}


def start(*arguments: object, code: str | None = None, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    how = ["-c", code] if code else ["-m", "fastuper"]
    return subprocess.Popen(
        [sys.executable, *how, *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=stderr,
        encoding="utf-8",
        preexec_fn=heed_interrupts if os.name == "posix" else None,
    )


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def read_labels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette()[: 3 * len(NAMES)] == class_palette(len(NAMES)).ravel().tolist()
        return np.asarray(image)


def expected_labels(model: Path, pixels: np.ndarray) -> np.ndarray:
    network = UperNetForSemanticSegmentation.from_pretrained(model).eval()
    inputs = UperNetImageProcessor.from_pretrained(model)(images=[Image.fromarray(pixels)], return_tensors="pt")
    return network.segment(inputs["pixel_values"], target_sizes=[pixels.shape[:2]])[0].numpy()


def file_names(folder: Path) -> list[str]:
    """Return the names in a folder, apart from the record of results."""
    return sorted(path.name for path in folder.iterdir() if path.name != RESULTS)


# Photographs


def test_photographs_without_transformers(model: Path, output: Path, tmp_path: Path) -> None:
    astronaut = save(tmp_path / "astronaut.png", data.astronaut())
    chelsea = save(tmp_path / "chelsea.png", data.chelsea())
    process = start(
        *("segment", astronaut, chelsea, "--model", model, "--output", output, "--device", "cpu", "--batch-size", 2),
        code=WITHOUT_TRANSFORMERS,
    )
    printed, complaints = process.communicate(timeout=120)
    assert process.returncode == 0, complaints
    assert complaints == "", "without a terminal there is no progress bar"
    assert file_names(output) == [f"{n}_{k}" for n in ("astronaut", "chelsea") for k in ("labels.png", "overlay.jpg")]
    assert "2 of 2 photos segmented" in printed

    for name, pixels in (("astronaut", data.astronaut()), ("chelsea", data.chelsea())):
        labels = read_labels(output / f"{name}_labels.png")
        np.testing.assert_array_equal(labels, expected_labels(model, pixels))
        shares = np.bincount(labels.ravel(), minlength=len(NAMES)) / labels.size
        assert (shares > 0.01).sum() > 1, "the label map has one class only, so that this test would show little"
        paragraph = printed[printed.index(f"{name}.png (") :]
        for index, share in enumerate(shares):
            if share > 0.001:
                assert f"{NAMES[index]} {share:.1%}".replace("%", " %") in paragraph
        with Image.open(output / f"{name}_overlay.jpg") as picture:
            assert picture.height == pixels.shape[0]
            assert picture.width > pixels.shape[1] + 50


def test_label_maps_are_those_of_transformers(model: Path, output: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processor_class = getattr(transformers, "SegformerImageProcessorPil", transformers.SegformerImageProcessor)
    photo = save(tmp_path / "coffee.png", data.coffee())
    assert run(photo, "-m", model, "-o", output).exit_code == 0
    theirs = transformers.UperNetForSemanticSegmentation.from_pretrained(model).eval()
    processor = processor_class.from_pretrained(model)
    with torch.inference_mode():
        outputs = theirs(**processor(images=Image.fromarray(data.coffee()), return_tensors="pt"))
        labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[(400, 600)])[0]
        logits = nn.functional.interpolate(outputs.logits, size=(400, 600), mode="bilinear", align_corners=False)[0]
    best, second = logits.topk(2, dim=0).values
    tied = best - second <= 8 * torch.finfo(torch.float32).eps * logits.abs().max()
    different = torch.from_numpy(read_labels(output / "coffee_labels.png").astype(np.int64)) != labels
    assert not (different & ~tied).any()
    assert tied.float().mean() < 0.001


def test_every_kind_of_photo(model: Path, output: Path, tmp_path: Path) -> None:
    photo = Image.fromarray(data.chelsea()).resize((90, 60))
    turned = Image.Exif()
    turned[0x0112] = 6
    wide = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    kinds = {
        "grey": save(tmp_path / "grey.png", photo.convert("L")),
        "black": save(tmp_path / "black.png", photo.convert("1")),
        "palette": save(tmp_path / "palette.png", photo.convert("P"), transparency=3),
        "rgba": save(tmp_path / "rgba.webp", photo.convert("RGBA")),
        "cmyk": save(tmp_path / "cmyk.jpg", photo.convert("CMYK")),
        "deep": save(tmp_path / "deep.png", wide),
        "turned": save(tmp_path / "turned.jpg", photo, exif=turned),
        "pixel": save(tmp_path / "pixel.png", photo.crop((40, 30, 41, 31))),
        "line": save(tmp_path / "line.png", photo.resize((700, 1))),
        "film": save(tmp_path / "film.gif", photo, save_all=True, append_images=[photo.rotate(90)]),
    }
    result = run(*kinds.values(), "-m", model, "-o", output, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    sizes = {kind: read_labels(output / f"{kind}_labels.png").shape for kind in kinds}
    special = {"turned": (90, 60), "pixel": (1, 1), "line": (1, 700)}
    assert sizes == {kind: special.get(kind, (60, 90)) for kind in kinds}
    np.testing.assert_array_equal(read_labels(output / "deep_labels.png"), read_labels(output / "grey_labels.png"))
    for kind in kinds:
        with Image.open(output / f"{kind}_overlay.jpg") as picture:
            picture.load()


def test_batches_give_the_labels_of_single_photos(model: Path, tmp_path: Path) -> None:
    sources = [("a", data.coffee()), ("b", data.chelsea()), ("c", data.astronaut())]
    photos = [save(tmp_path / f"{name}.png", pixels) for name, pixels in sources]
    assert run(*photos, "-m", model, "-o", tmp_path / "single").exit_code == 0
    assert run(*photos, "-m", model, "-o", tmp_path / "batch", "--batch-size", 2).exit_code == 0
    for name, _ in sources:
        single = read_labels(tmp_path / "single" / f"{name}_labels.png")
        assert (single != read_labels(tmp_path / "batch" / f"{name}_labels.png")).mean() < 1e-3  # near ties may change


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_type_to_compute_in_reaches_the_model(
    dtype: str, model: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = UperNetForSemanticSegmentation.segment
    types = []

    def spy(self: UperNetForSemanticSegmentation, pixels: torch.Tensor, **options: object) -> list[torch.Tensor]:
        types.append((pixels.dtype, {parameter.dtype for parameter in self.parameters()}))
        return segment(self, pixels, **options)

    monkeypatch.setattr(UperNetForSemanticSegmentation, "segment", spy)
    photo = save(tmp_path / "chelsea.png", data.chelsea())
    result = run(photo, "-m", model, "-o", output, "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert types == [(getattr(torch, dtype), {getattr(torch, dtype)})]
    assert read_labels(output / "chelsea_labels.png").shape == (300, 451)


def test_shares_are_printed_largest_first(
    model: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.tensor([[3] * 9 + [0] * 25 + [5] * 50 + [1] * 16]).repeat(20, 1)
    monkeypatch.setattr(UperNetForSemanticSegmentation, "segment", lambda *_, **__: [labels])
    result = run(save(tmp_path / "photo.png", np.zeros((20, 100, 3), np.uint8)), "-m", model, "-o", output)
    assert result.exit_code == 0, result.output
    assert "\n  water 50.0 %  sky 25.0 %  façade 16.0 %  tree 9.0 %\n" in result.stdout


def test_shares_of_many_classes_stand_in_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name and its share stay on one line; letters of East Asia are two columns wide."""
    monkeypatch.setenv("COLUMNS", "40")
    lines = in_columns(["道路 40.0 %", "traffic light 30.0 %", "sky 20.0 %", "wall 10.0 %"]).splitlines()
    assert lines == ["  道路 40.0 %  traffic light 30.0 %", "  sky 20.0 %   wall 10.0 %"]


def test_printed_shares_of_a_photograph(model: Path, output: Path, tmp_path: Path) -> None:
    result = run(save(tmp_path / "coffee.png", data.coffee()), "-m", model, "-o", output)
    assert result.exit_code == 0, result.output
    shares = [float(share) for share in re.findall(r"([\d.]+) %", result.stdout)]
    assert len(shares) > 1
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(NAMES) + 0.01)


def test_large_photo_and_the_limit(model: Path, output: Path, tmp_path: Path) -> None:
    large = save(tmp_path / "large.jpg", Image.fromarray(data.coffee()).resize((6000, 4000)))
    result = run(large, "-m", model, "-o", output, "--max-pixels", 23_999_999)
    assert result.exit_code == 1
    assert "large.jpg: 6000 x 4000 = 24,000,000 pixels is over the limit of 23,999,999" in result.stderr
    assert "--max-pixels" in result.stderr
    assert file_names(output) == []
    assert run(large, "-m", model, "-o", output).exit_code == 0
    assert read_labels(output / "large_labels.png").shape == (4000, 6000)


# The progress bar


def on_a_terminal(*arguments: object) -> str:
    """Run the command with a terminal as stderr; return the text on it."""
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # 0 columns at first: no bar
    process = start("segment", *arguments, "--device", "cpu", stderr=stderr)
    os.close(stderr)
    try:
        printed, _ = process.communicate(timeout=120)  # the terminal's buffer is large enough for a bar
        written = b""
        while True:
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # on Linux: the other end is closed
                break
            if not piece:
                break
            written += piece
    finally:
        process.kill()
        os.close(terminal)
    assert process.returncode == 0, written
    assert "photos segmented" in printed
    return written.decode()


@pytest.mark.skipif(pty is None, reason="needs a pseudo-terminal")
def test_several_photos_on_a_terminal_have_a_progress_bar(model: Path, output: Path, tmp_path: Path) -> None:
    photos = [save(tmp_path / f"{name}.png", data.chelsea()) for name in ("one", "two")]
    written = on_a_terminal(*photos, "-m", model, "-o", output)
    assert "0/2" in written
    assert "2/2" in written
    assert "photo" in written


@pytest.mark.exhaustive
@pytest.mark.skipif(pty is None, reason="needs a pseudo-terminal")
def test_one_photo_has_no_progress_bar(model: Path, output: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "one.png", data.chelsea())
    assert on_a_terminal(photo, "-m", model, "-o", output) == ""


# Photos and the names of their results


def test_folders_and_photos_of_one_name(model: Path, output: Path, tmp_path: Path) -> None:
    blue, red = (np.full((20, 30, 3), colour, dtype=np.uint8) for colour in ((0, 0, 255), (255, 0, 0)))
    first = save(tmp_path / "one" / "photo.png", blue)
    save(tmp_path / "two" / "photo.png", red)
    save(tmp_path / "two" / "Photo.jpg", red)
    save(tmp_path / "two" / "deeper" / "unseen.png", red)
    save(tmp_path / "two" / "._hidden.png", red)
    (tmp_path / "two" / "notes.txt").write_text("not a photo")
    result = run(first, tmp_path / "two", first, "-m", model, "-o", output)
    assert result.exit_code == 0, result.output
    assert "3 of 3 photos segmented" in result.stdout
    assert len(file_names(output)) == 6
    np.testing.assert_array_equal(read_labels(output / "photo_labels.png"), expected_labels(model, blue))
    assert re.search(r"two.photo\.png \(30 x 20\) -> photo-3_labels\.png", result.stdout)
    again = run(first, tmp_path / "two", first, "-m", model, "-o", output)
    assert again.stdout == result.stdout
    assert len(file_names(output)) == 6


def test_a_photo_is_never_overwritten_by_results(model: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", data.chelsea())
    confusing = save(tmp_path / "photo_labels.png", data.chelsea())
    before = confusing.read_bytes()
    assert run(photo, confusing, "-m", model, "-o", tmp_path).exit_code == 0
    assert confusing.read_bytes() == before
    assert read_labels(tmp_path / "photo-2_labels.png").shape == (300, 451)


def test_output_folder_that_is_also_input_is_refused(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "photo.png", data.chelsea())
    result = run(tmp_path, "-m", model, "-o", tmp_path / "." / "")
    assert result.exit_code == 2
    assert "both read and written" in result.stderr
    assert file_names(tmp_path) == ["photo.png"]


def test_classes_whose_numbers_have_gaps(model: Path, output: Path, tmp_path: Path) -> None:
    gaps = shutil.copytree(model, tmp_path / "gaps")
    config = json.loads((gaps / "config.json").read_text())
    config["id2label"] = {"1": "one", **{str(index): f"thing {index}" for index in range(7, 6 + len(NAMES))}}
    (gaps / "config.json").write_text(json.dumps(config))
    photo = save(tmp_path / "photo.png", np.asarray(data.coffee())[:50, :60])
    result = run(photo, "-m", gaps, "-o", output)
    assert result.exit_code == 0, result.output
    assert re.search(r"class \d+ [\d.]+ %|one [\d.]+ %", result.stdout)


def test_weights_that_are_not_finite(model: Path, output: Path, tmp_path: Path) -> None:
    network = UperNetForSemanticSegmentation.from_pretrained(model)
    torch.nn.init.constant_(network.decode_head.classifier.weight, float("nan"))
    network.save_pretrained(tmp_path / "nan")
    photo = save(tmp_path / "photo.png", np.zeros((40, 60, 3), np.uint8))
    result = run(photo, "-m", tmp_path / "nan", "-o", output)
    assert result.exit_code == 1
    assert "photo.png: the logits are not finite" in result.stderr
    assert file_names(output) == []


def test_the_longest_name(model: Path, output: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / f"{'n' * 240}.png", np.zeros((40, 60, 3), np.uint8))
    assert run(photo, "-m", model, "-o", output).exit_code == 0
    assert len(file_names(output)) == 2


# Bad photos among good ones


def test_bad_photos_do_not_stop_the_others(model: Path, output: Path, tmp_path: Path) -> None:
    good = [save(tmp_path / f"good{number}.png", data.chelsea()) for number in range(3)]
    text, empty, cut, bomb = (tmp_path / name for name in ("text.jpg", "empty.png", "cut.jpg", "bomb.png"))
    text.write_text("no photo\n" * 99)
    empty.touch()
    save(cut, data.coffee())
    cut.write_bytes(cut.read_bytes()[:9000])
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 90_000, 90_000, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 1000) + b"IDAT")
    floats = save(tmp_path / "floats.tif", np.ones((4, 4), dtype=np.float32))
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    photos = [good[0], text, empty, good[1], cut, bomb, floats, tmp_path / "gone.png", nothing, good[2]]

    result = run(*photos, "-m", model, "-o", output, "--batch-size", 3)
    assert result.exit_code == 1
    assert file_names(output) == [f"good{n}_{k}" for n in range(3) for k in ("labels.png", "overlay.jpg")]
    assert "3 of 10 photos segmented" in result.stdout
    assert "7 failed:" in result.stderr
    for path, reason in {
        text: "is not an image",
        empty: "is empty",
        cut: "truncated",
        bomb: "90000 x 90000 = 8,100,000,000 pixels is over the limit",
        floats: "holds 32-bit floats",
        tmp_path / "gone.png": "no such file",
        nothing: "holds no photos",
    }.items():
        assert re.search(rf"^  {re.escape(str(path))}: .*{reason}", result.stderr, re.MULTILINE), result.stderr
    assert "Traceback" not in result.output


def test_batch_that_does_not_fit_in_memory_is_segmented_one_by_one(
    model: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = UperNetForSemanticSegmentation.segment
    calls = []

    def small_memory(
        self: object, pixels: torch.Tensor, target_sizes: list[tuple[int, int]], **options: object
    ) -> list[torch.Tensor]:
        calls.append(len(pixels))
        if len(pixels) > 1 or target_sizes[0][0] == 400:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a capacity of ...")
        return segment(self, pixels, target_sizes, **options)

    monkeypatch.setattr(UperNetForSemanticSegmentation, "segment", small_memory)
    sources = {"a": data.chelsea(), "big": data.coffee(), "c": data.chelsea()}
    photos = [save(tmp_path / f"{name}.png", pixels) for name, pixels in sources.items()]
    result = run(*photos, "-m", model, "-o", output, "--batch-size", 3)
    assert calls == [3, 1, 1, 1]
    assert result.exit_code == 1
    assert file_names(output) == ["a_labels.png", "a_overlay.jpg", "c_labels.png", "c_overlay.jpg"]
    assert re.search(r"^  .*big\.png: CUDA out of memory\. .* GPU 0 has", result.stderr, re.MULTILINE)


# Bad models


def copy_of(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


class RunsCode:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "fault",
    [
        "no config",
        "broken config",
        "no weights",
        "corrupt weights",
        "truncated weights",
        "pickle",
        "other shapes",
        "missing",
    ],
)
def test_bad_model_is_one_line_and_status_2(fault: str, model: Path, output: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", data.chelsea())
    folder = copy_of(model, tmp_path / "broken")
    weights = folder / "model.safetensors"
    proof = tmp_path / "code was run"
    if fault == "no config":
        (folder / "config.json").unlink()
    elif fault == "broken config":
        (folder / "config.json").write_text("{")
    elif fault == "no weights":
        weights.unlink()
    elif fault == "corrupt weights":
        weights.write_bytes(b"\x93" * 5000)
    elif fault == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif fault == "pickle":
        weights.unlink()
        torch.save({"weight": RunsCode(proof)}, folder / "pytorch_model.bin")
    elif fault == "other shapes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 24}))
    else:
        folder = tmp_path / "not" / "there"
    result = run(photo, "-m", folder, "-o", output)
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert str(folder) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert len(result.stderr) < 1000
    assert not proof.exists()
    assert file_names(output) == []


def test_missing_preprocessor_config_is_reported(model: Path, output: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path / "bare")
    (folder / "preprocessor_config.json").unlink()
    result = run(save(tmp_path / "photo.png", data.chelsea()), "-m", folder, "-o", output)
    assert result.exit_code == 0
    assert "no preprocessor_config.json" in result.stderr
    assert read_labels(output / "photo_labels.png").shape == (300, 451)


def test_usage_errors_are_status_2(model: Path, output: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", data.chelsea())
    assert run(photo, "-m", model).exit_code == 2
    assert run("-m", model, "-o", output).exit_code == 2
    assert run(photo, "-m", model, "-o", output, "--batch-size", 0).exit_code == 2
    assert run(photo, "-m", model, "-o", output, "--dtype", "int8").exit_code == 2
    arguments = ["segment", str(photo), "-m", str(model), "-o", str(output), "--device", "abacus"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--device abacus cannot be used" in result.stderr
    result = run(photo, "-m", model, "-o", photo)
    assert result.exit_code == 2
    assert "cannot make the output folder" in result.stderr


# Nothing half written


@pytest.mark.parametrize("full_from", ["PNG", "JPEG"])
def test_failed_write_leaves_no_part(
    full_from: str, model: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = save(tmp_path / "photo.png", data.chelsea())
    write = Image.Image.save

    def disk_full(self: Image.Image, path: Path, format: str) -> None:
        if format != full_from:
            return write(self, path, format=format)
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", lambda self, path, format, **_: disk_full(self, path, format))
    result = run(photo, "-m", model, "-o", output)
    assert result.exit_code == 1
    assert result.stderr.endswith("photo.png: No space left on device\n")
    assert file_names(output) == []


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("name", [pytest.param("SIGTERM", marks=pytest.mark.exhaustive), "SIGINT", "SIGKILL"])
def test_stopped_while_writing(name: str, model: Path, output: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", data.chelsea())
    slow = (
        "import time; from pathlib import Path; from PIL import Image; from fastuper.cli import main\n"
        "def save(self, path, **options):\n"
        "    Path(path).write_bytes(b'half of it'); print('writing', flush=True); time.sleep(60)\n"
        "Image.Image.save = save; main()"
    )
    process = start("segment", photo, "-m", model, "-o", output, "--device", "cpu", code=slow)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert [path.suffix for path in output.iterdir() if "results" not in path.name] == [".png"]
    process.send_signal(getattr(signal, name))
    begun = time.monotonic()
    process.communicate(timeout=30)
    assert time.monotonic() - begun < 20
    assert process.returncode != 0
    left = [path for path in file_names(output) if name != "SIGKILL" or not path.startswith(".")]
    assert left == []
    assert (output / RESULTS).read_bytes() == b""


# Help


def test_version_and_help() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout == f"fastuper {fastuper.__version__}\n"
    text = CliRunner().invoke(app, ["segment", "--help"]).stdout
    for option in ("--model", "--output", "--device", "--dtype", "--batch-size", "--max-pixels", "--skip-existing"):
        assert option in text


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from fastuper.cli import app\n"
        "try: app(['segment', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(','.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    process = start(code=code)
    printed, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    assert "--model" in printed


def test_every_public_name_can_be_imported() -> None:
    assert fastuper.__all__
    for name in fastuper.__all__:
        assert getattr(fastuper, name).__name__ == name
        assert name in dir(fastuper)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastuper.nothing


def test_config_of_the_model_used_here_is_in_hub_layout(model: Path) -> None:
    assert file_names(model) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert json.loads((model / "config.json").read_text())["id2label"]["1"] == "façade"


def test_a_model_of_one_class(output: Path, tmp_path: Path) -> None:
    """Its label maps have two classes: the background, and the class under its name."""
    torch.manual_seed(0)
    backbone = ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32])
    config = UperNetConfig(backbone, hidden_size=16, auxiliary_channels=8, id2label={0: "water"})
    network = UperNetForSemanticSegmentation(config)
    torch.nn.init.ones_(network.decode_head.classifier.bias)  # every pixel is in the class
    network.save_pretrained(tmp_path / "one")
    UperNetImageProcessor(size={"height": 64, "width": 96}).save_pretrained(tmp_path / "one")
    photo = tmp_path / "photo.png"
    Image.fromarray(data.coffee()[:90, :120]).save(photo)
    result = run(photo, "--model", tmp_path / "one", "--output", output)
    assert result.exit_code == 0, result.output
    assert "water 100.0 %" in result.output
    with Image.open(output / "photo_labels.png") as image:
        assert np.array_equal(np.asarray(image), np.ones((90, 120)))


def test_without_a_model(output: Path, tmp_path: Path) -> None:
    """The demo model segments a scene, and a line says that it only knows scenes."""
    picture, truth = scene(7)
    result = run(save(tmp_path / "scene.png", picture), "--output", output)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("no --model: using the demo model, which only knows")
    assert len(result.stderr.strip().splitlines()) == 1
    assert "generated street scenes" in result.stderr
    assert "pavement" in result.stdout
    with Image.open(output / "scene_labels.png") as image:
        assert image.getpalette()[: PALETTE.size] == PALETTE.ravel().tolist()
        assert (np.asarray(image) == truth).mean() > 0.9
