"""`fastuper parse`: photographs, the consistency of its files, options, bad input, and `fastuper segment` beside it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import nn
from typer.testing import CliRunner, Result

from fastuper import ConvNextConfig, UperNetImageProcessor
from fastuper.cli import app
from fastuper.data.panels import task_palette
from fastuper.inference.results import RESULTS
from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing
from fastuper.models.parsing_configuration import UnifiedPerceptualParsingConfig
from tests.end_to_end.test_segment import run as run_segment
from tests.end_to_end.test_segment import save

LABELS = {
    "scene": [f"scene {index}" for index in range(7)],
    "object": ["-", *(f"thing {index}" for index in range(1, 300))],
    "part": ["-", "lid", "leg", "tête", "wheel"],
    "material": ["-", "wood", "metal", "skin", "glass"],
    "texture": ["banded", "dotted", "woven"],
}
COMMON = (0, 2, 44, 290, 299)
"""The objects that the model finds; 44 and 300 have one low byte, as do 2 and 258."""
PARTS = {2: (1, 3), 44: (2, 3, 4), 290: (1, 2, 4), 299: (1, 2, 3, 4)}
MAPS = {"object": "objects", "part": "parts", "material": "materials", "texture": "textures"}
FILES = ["materials.png", "objects.png", "parsing.jpg", "parsing.json", "parts.png", "textures.png"]


@pytest.fixture(scope="module")
def parser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a checkpoint: a tiny network whose maps have several classes."""
    folder = tmp_path_factory.mktemp("parser")
    torch.manual_seed(0)
    config = UnifiedPerceptualParsingConfig(
        ConvNextConfig(
            depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], out_features=["stage1", "stage2", "stage3", "stage4"]
        ),
        hidden_size=16,
        pool_channels=8,
        texture_channels=8,
        labels=LABELS,
        object_parts=PARTS,
    )
    network = UperNetForUnifiedPerceptualParsing(config)
    for parameter in network.parameters():
        if parameter.ndim >= 2:
            nn.init.kaiming_normal_(parameter)
    with torch.no_grad():
        bias = network.decode_head.object_head.classifier.bias
        bias -= 20
        bias[list(COMMON)] += 20
    network.save_pretrained(folder)
    UperNetImageProcessor(size={"height": 64, "width": 96}).save_pretrained(folder)
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["parse", *map(str, arguments), "--device", "cpu"])


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != RESULTS)


def read_maps(output: Path, name: str) -> dict[str, np.ndarray]:
    """Return the label maps of a photo's files, whose colours are checked."""
    maps = {}
    for task, ending in MAPS.items():
        path = output / f"{name}_{ending}.png"
        if path.exists():
            with Image.open(path) as image:
                if task == "object":
                    assert image.mode.startswith("I;16")
                else:
                    assert image.mode == "P"
                    palette = task_palette(task, len(LABELS[task])).ravel().tolist()
                    assert image.getpalette()[: len(palette)] == palette
                maps[task] = np.asarray(image)
    return maps


def read_report(output: Path, name: str) -> dict[str, Any]:
    return json.loads((output / f"{name}_parsing.json").read_text("ascii"))


def check_region(entry: dict[str, Any], inside: np.ndarray, maps: dict[str, np.ndarray]) -> None:
    """Check the pixels of an entry, and its materials and textures, which have at least a tenth of it."""
    assert entry["pixels"] == inside.sum()
    for task in ("material", "texture"):
        counts = np.bincount(maps[task][inside], minlength=len(LABELS[task]))
        if task == "material":
            counts[0] = 0
        expected = {LABELS[task][i]: n / inside.sum() for i, n in enumerate(counts) if n and n / inside.sum() >= 0.1}
        assert {each["name"]: each["share"] for each in entry[MAPS[task]]} == expected


def check_report(report: dict[str, Any], maps: dict[str, np.ndarray]) -> None:
    """Check that a report says what the label maps show."""
    objects = maps["object"]
    assert {entry["id"] for entry in report["objects"]} == set(np.unique(objects)) - {0}
    for entry in report["objects"]:
        inside = objects == entry["id"]
        rows, columns = np.nonzero(inside)
        assert entry["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert entry["name"] == LABELS["object"][entry["id"]]
        assert entry["share"] == inside.mean()
        check_region(entry, inside, maps)
        assert {part["id"] for part in entry["parts"]} == set(np.unique(maps["part"][inside])) - {0}
        assert {part["id"] for part in entry["parts"]} <= set(PARTS[entry["id"]])
        for part in entry["parts"]:
            check_region(part, inside & (maps["part"] == part["id"]), maps)


def test_photographs(parser: Path, output: Path, tmp_path: Path) -> None:
    """The files of photographs in batches, with a damaged one among them, are what the model says."""
    sources = {"coffee": data.coffee()[:200, :300], "chelsea": data.chelsea(), "rocket": data.rocket()[:200, :300]}
    photos = [save(tmp_path / f"{name}.png", pixels) for name, pixels in sources.items()]
    bad = tmp_path / "bad.jpg"
    bad.write_text("no photo")
    result = run(photos[0], bad, *photos[1:], "-m", parser, "-o", output, "--batch-size", 2)
    assert result.exit_code == 1, result.output
    assert "3 of 4 photos parsed" in result.stdout
    assert "300 objects: their label maps are 16-bit grey PNGs" in result.stderr
    assert re.search(r"^  .*bad\.jpg: is not an image", result.stderr, re.MULTILINE)
    assert file_names(output) == [f"{name}_{end}" for name in sorted(sources) for end in FILES]

    network = UperNetForUnifiedPerceptualParsing.from_pretrained(parser).eval()
    processor = UperNetImageProcessor.from_pretrained(parser)
    classes = set()
    for name, pixels in sources.items():
        inputs = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
        (expected,) = network.parse(inputs["pixel_values"], target_sizes=[pixels.shape[:2]])
        maps, report = read_maps(output, name), read_report(output, name)
        for task, field in MAPS.items():
            different = maps[task] != getattr(expected, field).numpy()
            assert different.mean() < 1e-3  # a batch may change near ties
        assert [each["id"] for each in report["scene"]] == [index for index, _ in expected.scene]
        assert [each["probability"] for each in report["scene"]] == pytest.approx(
            [probability for _, probability in expected.scene], abs=1e-5
        )
        assert (report["width"], report["height"]) == (pixels.shape[1], pixels.shape[0])
        assert report["photo"] == str(tmp_path / f"{name}.png")
        check_report(report, maps)
        with Image.open(output / f"{name}_parsing.jpg") as picture:
            assert min(picture.size) > max(pixels.shape)
        classes |= set(np.unique(maps["object"]))
        best = f"scene: {LABELS['scene'][report['scene'][0]['id']]} {report['scene'][0]['probability']:.1%}"
        assert best.replace("%", " %") in result.stdout
    assert max(classes) > 255, "no object has a number of more than 8 bits, so that this test would show little"
    assert len(classes) > 2

    lines = {Path(line["photo"]).stem: line for line in map(json.loads, (output / RESULTS).read_text().splitlines())}
    assert lines["bad"]["error"]
    assert sorted(lines["rocket"]["outputs"]) == [f"rocket_{end}" for end in FILES]
    shares = {each["class"]: each["share"] for each in lines["rocket"]["shares"]}
    assert shares == {index: (read_maps(output, "rocket")["object"] == index).mean() for index in shares}
    assert sum(shares.values()) == pytest.approx(1)


def test_options_are_part_of_what_made_the_results(parser: Path, output: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "chelsea.png", Image.fromarray(data.chelsea()).resize((90, 60)))

    def again(*options: str) -> str:
        result = run(photo, "-m", parser, "-o", output, "--skip-existing", *options)
        assert result.exit_code == 0, result.output
        return "skipped" if "1 already there" in result.stdout else "done"

    assert again() == "done"
    assert again() == again("--min-share", "0", "--tasks", "texture,material,part,object,scene") == "skipped"
    for change in ("--mask-background", "--scales 32,48", "--min-part-share 0.2", "--tasks scene"):
        assert again(*change.split()) == "done"
    assert again("--tasks", "scene") == "skipped"
    assert file_names(output) == ["chelsea_parsing.jpg", "chelsea_parsing.json"]


def test_tasks_scales_and_thresholds(
    parser: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[tuple[int, ...]], dict[str, Any]]] = []
    parse = UperNetForUnifiedPerceptualParsing.parse

    def spy(self: UperNetForUnifiedPerceptualParsing, pixels: list[torch.Tensor], **options: Any) -> Any:
        calls.append(([tuple(scale.shape) for scale in pixels], options))
        return parse(self, pixels, **options)

    monkeypatch.setattr(UperNetForUnifiedPerceptualParsing, "parse", spy)
    photo = save(tmp_path / "coffee.png", data.coffee()[:100, :300])
    arguments = ("-m", parser, "-o", output, "--tasks", "object, scene,material", "--scales", "40,64", "--top", 2)
    assert run(photo, *arguments, "--mask-background", "--min-material-share", 0.6).exit_code == 0
    ((shapes, options),) = calls
    assert shapes == [(1, 3, 40, 120), (1, 3, 64, 192)]
    assert options["tasks"] == ("scene", "object", "material")
    assert options["mask_background"] is True
    kept = [f"coffee_{end}" for end in FILES if end not in ("parts.png", "textures.png")]
    assert file_names(output) == kept
    report = read_report(output, "coffee")
    assert len(report["scene"]) == 2
    assert not {"parts", "textures"} & {*report, *report["objects"][0]}
    maps = read_maps(output, "coffee")
    assert min(maps["object"].min(), maps["material"].min()) > 0
    listed = [each["share"] for entry in report["objects"] for each in entry["materials"]]
    assert all(share >= 0.6 for share in listed)
    assert run(photo, "-m", parser, "-o", output, "--tasks", "part").exit_code == 0
    assert file_names(output) == ["coffee_parsing.jpg", "coffee_parsing.json", "coffee_parts.png"]
    report = read_report(output, "coffee")
    parts = read_maps(output, "coffee")["part"]
    assert "objects" not in report
    assert {each["id"]: each["pixels"] for each in report["parts"]} == {
        index: (parts == index).sum() for index in set(np.unique(parts)) - {0}
    }


def test_instances(parser: Path, output: Path, tmp_path: Path) -> None:
    """Each connected region of an object has an entry; together they are the object, but for small regions."""
    from skimage.measure import label, regionprops

    photo = save(tmp_path / "chelsea.png", data.chelsea())
    assert run(photo, "-m", parser, "-o", output, "--instances", "--min-share", "0.002").exit_code == 0
    objects, report = read_maps(output, "chelsea")["object"], read_report(output, "chelsea")
    regions = regionprops(label(objects + 1, connectivity=2))
    expected = sorted(
        (int(objects[tuple(region.coords[0])]), int(region.area), [int(region.bbox[i]) for i in (1, 0, 3, 2)])
        for region in regions
        if region.area >= 0.002 * objects.size and objects[tuple(region.coords[0])] > 0
    )
    found = sorted((entry["id"], entry["pixels"], entry["box"]) for entry in report["objects"])
    assert found == expected
    assert len(found) > len({index for index, _, _ in found})


def test_a_photo_without_any_object(parser: Path, output: Path, tmp_path: Path) -> None:
    network = UperNetForUnifiedPerceptualParsing.from_pretrained(parser)
    with torch.no_grad():
        network.decode_head.object_head.classifier.bias[0] += 1000
    nothing = tmp_path / "nothing"
    network.save_pretrained(nothing)
    UperNetImageProcessor.from_pretrained(parser).save_pretrained(nothing)
    photo = save(tmp_path / "photo.png", np.zeros((20, 30, 3), np.uint8))
    result = run(photo, "-m", nothing, "-o", output, "--instances")
    assert result.exit_code == 0, result.output
    assert read_report(output, "photo")["objects"] == []
    assert not read_maps(output, "photo")["part"].any()
    assert "no object 100.0 %" in result.stdout


def test_parse_and_segment_in_one_folder(model: Path, parser: Path, output: Path, tmp_path: Path) -> None:
    photos = [save(tmp_path / folder / "a.png", data.coffee()[:40, :60]) for folder in ("one", "two")]
    for _ in range(2):
        segmented = run_segment(*photos, "-m", model, "-o", output, "--skip-existing")
        parsed = run(*reversed(photos), "-m", parser, "-o", output, "--skip-existing")
        assert (segmented.exit_code, parsed.exit_code) == (0, 0)
    assert "0 of 2 photos segmented, 2 already there" in segmented.stdout
    assert "0 of 2 photos parsed, 2 already there" in parsed.stdout
    assert len(file_names(output)) == 2 * (2 + len(FILES))


def test_models_of_the_other_kind_are_refused(model: Path, parser: Path, output: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", np.zeros((20, 30, 3), np.uint8))
    for result, refused, command in (
        (run(photo, "-m", model, "-o", output), model, "segment"),
        (run_segment(photo, "-m", parser, "-o", output), parser, "parse"),
    ):
        assert result.exit_code == 2
        assert f"cannot load the model {refused}: " in result.stderr
        assert result.stderr.endswith(f"use it with `fastuper {command}`\n")
        assert len(result.stderr.splitlines()) == 1
    assert file_names(output) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--tasks scene,objects",
            "--tasks scene,objects: task 'objects' is not known; known are scene, object, part, ",
        ),
        ("--tasks=", "--tasks : task '' is not known"),
        ("--tasks scene,scene", "--tasks scene,scene: task 'scene' is named twice"),
        ("--tasks scene --instances", "--instances are of objects; leave out --instances, or add object"),
        ("--scales 300,,400", "--scales 300,,400: give numbers of pixels from 1"),
        ("--scales 0", "--scales 0: give numbers of pixels from 1"),
        ("--scales 300,99999", "--scales 300,99999: give numbers of pixels from 1 to 16384"),
        ("--min-share 1.5", "Invalid value for '--min-share'"),
        ("--top 0", "Invalid value for '--top'"),
    ],
)
def test_options_that_cannot_be_used(options: str, message: str, parser: Path, output: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", np.zeros((20, 30, 3), np.uint8))
    result = run(photo, "-m", parser, "-o", output, *options.split())
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not output.exists() or file_names(output) == []


def test_tasks_that_the_model_does_not_know(parser: Path, output: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", np.zeros((20, 30, 3), np.uint8))
    config = UnifiedPerceptualParsingConfig.from_pretrained(parser)
    small = shutil.copytree(parser, tmp_path / "small")
    config.tasks = ("scene", "texture")
    UperNetForUnifiedPerceptualParsing(config).save_pretrained(small)
    result = run(photo, "-m", small, "-o", output, "--tasks", "scene,object")
    assert result.exit_code == 2
    assert "--tasks scene,object: task 'object' is not known; known are scene, texture to the model" in result.stderr
    assert run(photo, "-m", small, "-o", output).exit_code == 0
    assert file_names(output) == ["photo_parsing.jpg", "photo_parsing.json", "photo_textures.png"]


def test_without_a_model_and_without_scipy(
    parser: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = save(tmp_path / "photo.png", np.zeros((20, 30, 3), np.uint8))
    result = run(photo, "-o", output)
    assert result.exit_code == 2
    assert "--model" in result.stderr
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    result = run(photo, "-m", parser, "-o", output, "--instances")
    assert result.exit_code == 2
    assert "pip install 'fastuper[parse]'" in result.stderr
    assert not output.exists()


def test_a_failed_write_leaves_no_part(
    parser: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = save(tmp_path / "photo.png", np.zeros((20, 30, 3), np.uint8))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    result = run(photo, "-m", parser, "-o", output)
    assert result.exit_code == 1
    assert result.stderr.endswith("photo.png: No space left on device\n")
    assert file_names(output) == []
