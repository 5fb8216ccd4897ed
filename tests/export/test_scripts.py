"""run.py, beside an exported model: prepares a photo as the image processor does, and writes the label map."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastuper import UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.export import export_model
from fastuper.scenes import MODEL, scene

SCRIPTS = Path(__file__).parents[2] / "fastuper/export/scripts"
SIZE = (150, 203)
"""(height, width) of the photo."""


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "scene.png"
    scene(5, SIZE)[0].save(path)
    return path


def opened(folder: Path, monkeypatch, photo: Path, *, fixed="any", inputs=("pixel_values",), **options):
    """Return `Photo` of photo.py, in a folder of an exported model with these options of its image processor."""
    processor = UperNetImageProcessor(**options).to_dict()
    classes = {"id2label": {str(i): f"c{i}" for i in range(7)}, "palette": [[i, 0, 0] for i in range(7)]}
    report = {"preprocessing": processor, "settings": {"size": fixed, "dtype": "float32"}, **classes}
    report |= {"inputs": {name: {} for name in inputs}, "outputs": {"logits": {}}}
    (folder / "export.json").write_text(json.dumps(report))
    (folder / "photo.py").write_bytes((SCRIPTS / "photo.py").read_bytes())
    spec = importlib.util.spec_from_file_location("photo", folder / "photo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["run.py", str(photo), str(folder / "out.png")])
    return module.Photo()


OPTIONS = {
    "square": {"size": 96},
    "sides": {"size": (70, 133)},
    "shorter-side": {"size": {"shortest_edge": 100}},
    "as-it-is": {"do_resize": False},
    "bicubic": {"resample": 3, "size": 300},
    "other-numbers": {"image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 1.0], "rescale_factor": 1 / 127.5, "size": 64},
    "no-normalisation": {"do_normalize": False, "size": 64},
    "levels": {"do_normalize": False, "do_rescale": False, "size": 64},
    "grey": {"image_mean": [0.5], "image_std": [0.5], "size": 64},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_pixels_are_those_of_the_image_processor(case, tmp_path, monkeypatch, photo):
    pixels = opened(tmp_path, monkeypatch, photo, **OPTIONS[case]).inputs["pixel_values"]
    expected = UperNetImageProcessor(**OPTIONS[case])(Image.open(photo), return_tensors="np")["pixel_values"]
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, expected.astype(np.float32))


def test_a_turned_photo_is_upright(tmp_path, monkeypatch, photo):
    turned, exif = Image.open(photo).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    pixels = opened(tmp_path, monkeypatch, tmp_path / "turned.png", do_resize=False).inputs["pixel_values"]
    expected = opened(tmp_path, monkeypatch, photo, do_resize=False).inputs["pixel_values"]
    np.testing.assert_array_equal(pixels, expected)


def test_a_model_of_one_size_gets_this_size(tmp_path, monkeypatch, photo):
    pixels = opened(tmp_path, monkeypatch, photo, fixed="64x90").inputs["pixel_values"]
    expected = UperNetImageProcessor(size=(64, 90))(Image.open(photo), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixels, expected)


def test_a_model_that_prepares_photos_gets_the_photo(tmp_path, monkeypatch, photo):
    inputs = opened(tmp_path, monkeypatch, photo, inputs=("images", "target_size")).inputs
    assert [*inputs] == ["images", "target_size"]
    np.testing.assert_array_equal(inputs["images"][0], np.asarray(Image.open(photo)))
    assert inputs["target_size"].tolist() == list(SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"antialias": False}, "export the model with --with-preprocessing"),
        ({"size": {"max_height": 100, "max_width": 100}}, "export the model with --with-preprocessing"),
        ({"image_mean": [0.5] * 4, "image_std": [0.5] * 4}, "the model takes images of 4 channels, and a photo has 3"),
    ],
)
def test_what_is_not_prepared_is_refused(options, message, tmp_path, monkeypatch, photo):
    with pytest.raises(SystemExit, match=message):
        opened(tmp_path, monkeypatch, photo, **options)


def test_a_file_that_is_no_photo_is_refused(tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(SystemExit, match=r"cannot read .*text\.jpg"):
        opened(tmp_path, monkeypatch, tmp_path / "text.jpg")


@pytest.mark.parametrize("classes", [1, 7])
@pytest.mark.parametrize("size", [(40, 60), (300, 401)])
def test_labels_of_logits(classes, size, tmp_path, monkeypatch, photo, capsys):
    logits = torch.randn(1, classes, *size, generator=torch.Generator().manual_seed(0))
    opened(tmp_path, monkeypatch, photo).save([logits.numpy()])
    saved = Image.open(tmp_path / "out.png")
    labels = torch.from_numpy(np.asarray(saved).astype(np.int64))
    values = F.interpolate(logits, SIZE, mode="bilinear")[0]
    assert torch.equal(labels, values.argmax(0) if classes > 1 else (values[0] > 0).long())
    assert saved.mode == "P"
    assert saved.getpalette()[:6] == [0, 0, 0, 1, 0, 0]
    share = (labels == 1).float().mean()
    assert f"{share:6.1%} c1" in capsys.readouterr().out


def test_a_label_map_of_another_size(tmp_path, monkeypatch, photo):
    labels = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    opened(tmp_path, monkeypatch, photo).save([labels])
    saved = np.asarray(Image.open(tmp_path / "out.png"))
    assert saved.shape == SIZE
    np.testing.assert_array_equal(np.unique(saved), range(6))


def variables() -> dict[str, str]:
    """Return the environment without the variables that give Python other folders of modules."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def check_labels(python: Path, folder: Path, photo: Path, output: Path, **processing) -> None:
    """Run run.py, and compare the label map with that of `fastuper segment` wherever rounding does not decide."""
    arguments = [str(python), str(folder / "run.py"), str(photo), str(output)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=variables(), cwd=output.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert "road" in done.stdout
    model = UperNetForSemanticSegmentation.from_pretrained(MODEL, dtype=torch.float32).eval()
    pixels = UperNetImageProcessor.from_pretrained(MODEL, **processing)(Image.open(photo), return_tensors="pt")
    with torch.no_grad():
        logits = F.interpolate(model(**pixels).logits, SIZE, mode="bilinear")[0]
    (expected,) = model.segment(pixels["pixel_values"], [SIZE])
    best = logits.topk(2, dim=0).values
    decided = best[0] - best[1] > 1e-4 * logits.abs().max()
    labels = torch.from_numpy(np.asarray(Image.open(output)).astype(np.int64))
    assert torch.equal(labels[decided], expected[decided])
    assert decided.float().mean() > 0.99


def test_the_script_of_onnx(exported_onnx, photo, tmp_path):
    check_labels(Path(sys.executable), exported_onnx, photo, tmp_path / "labels.png")


def files_of(name: str, seen: set[str]) -> Iterator[Path]:
    """Yield what a distribution and those that it requires put into site-packages, of those that are installed."""
    try:
        found: Distribution = distribution(name)
    except PackageNotFoundError:
        return
    if found.name in seen:
        return
    seen.add(found.name)
    for top in {file.parts[0] for file in found.files or () if file.parts[0] != ".."}:
        yield Path(str(found.locate_file(top)))
    for requirement in found.requires or ():
        if "extra ==" not in requirement:
            yield from files_of(requirement.split(";")[0].split("[")[0].strip("()<>=!~ 0123456789.,*"), seen)


@pytest.fixture(scope="module", params=["onnx", "openvino", "torch", "aoti", "executorch"])
def bare(request, tmp_path_factory) -> tuple[str, Path]:
    """Return a format, and the Python of a virtual environment that has its runtime alone."""
    if request.param == "executorch":
        pytest.importorskip("executorch")
    folder = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], env=variables(), check=True)
    python = folder / "bin/python"
    runtime = {"onnx": "onnxruntime", "openvino": "openvino"}.get(request.param)
    if runtime is not None:
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", runtime, "numpy", "pillow"], env=variables(), check=True
        )
    else:  # PyTorch is too large to be downloaded: it is linked, and what it requires
        packages = next((folder / "lib").glob("python*")) / "site-packages"
        wanted = ["torch", "numpy", "pillow", *(["executorch"] if request.param == "executorch" else [])]
        seen: set[str] = set()
        for path in (path for name in wanted for path in files_of(name, seen)):
            if not (packages / path.name).exists():
                (packages / path.name).symlink_to(path)
    for absent in ("fastuper", "transformers", *(["torch"] if runtime else [])):
        found = subprocess.run(
            [str(python), "-c", f"import {absent}"], capture_output=True, env=variables(), check=False
        )
        assert b"ModuleNotFoundError" in found.stderr
    return request.param, python


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["logits", "labels"])
def test_the_script_in_a_bare_environment(bare, kind, photo, tmp_path):
    format, python = bare
    options = {"size": "192x256"} if format == "executorch" else {}
    if kind == "labels":
        options |= {"labels": True, "target_size": format != "executorch"}
    export_model(MODEL, tmp_path / "exported", format=format, **options)
    size = {"size": (192, 256)} if format == "executorch" else {}
    check_labels(python, tmp_path / "exported", photo, tmp_path / "labels.png", **size)
