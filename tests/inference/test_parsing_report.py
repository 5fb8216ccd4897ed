"""The report of a parsed photo against a count of its pixels one by one, and its thresholds and instances."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastuper.inference import parsing_report as module
from fastuper.inference.parsing_report import ReportOptions, check_instances, parsing_report

LABELS = {
    "scene": ["field", "street"],
    "object": ["-", "wall", "car", "person", "tree"],
    "part": ["-", "door", "wheel", "head"],
    "material": ["-", "metal", "skin"],
    "texture": ["banded", "dotted", "woven"],
}
LISTS = {"part": "parts", "material": "materials", "texture": "textures"}


def random_maps(seed: int, height: int, width: int, tasks: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return maps of blocks, so that regions have several pixels."""
    random = np.random.default_rng(seed)
    maps = {}
    for task in tasks:
        blocks = random.integers(0, len(LABELS[task]), (-(-height // 2), -(-width // 3)))
        maps[task] = np.kron(blocks, np.ones((2, 3), np.int64))[:height, :width].astype(np.uint8)
    return maps


def naive_list(maps: dict[str, np.ndarray], pixels: list[tuple[int, int]], task: str, least: float) -> list[dict]:
    """Return the classes of a task among some pixels, counted one by one."""
    counts = Counter(int(maps[task][pixel]) for pixel in pixels)
    if task != "texture":
        counts.pop(0, None)
    return [
        {"id": index, "name": LABELS[task][index], "share": count / len(pixels), "pixels": count}
        for index, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if count / len(pixels) >= least
    ]


def components(inside: set[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Return the connected regions of a set of pixels, also over corners."""
    found = []
    while inside:
        pending, region = [min(inside)], []
        inside = inside - {pending[0]}
        while pending:
            row, column = pending.pop()
            region.append((row, column))
            near = {(row + down, column + along) for down in (-1, 0, 1) for along in (-1, 0, 1)} & inside
            inside -= near
            pending += near
        found.append(region)
    return found


def naive_report(maps: dict[str, np.ndarray], options: ReportOptions) -> dict[str, Any]:
    shape = next(iter(maps.values())).shape
    everywhere = list(np.ndindex(shape))
    surfaces = [task for task in ("material", "texture") if task in maps]
    report: dict[str, Any] = {LISTS[task]: naive_list(maps, everywhere, task, 0) for task in LISTS if task in maps}
    if "object" not in maps:
        return report
    report["objects"] = []
    for index in range(1, len(LABELS["object"])):
        inside = {pixel for pixel in everywhere if maps["object"][pixel] == index}
        for pixels in components(inside) if options.instances else [list(inside)]:
            if not pixels or len(pixels) / len(everywhere) < options.smallest_object:
                continue
            rows, columns = zip(*pixels, strict=True)
            entry: dict[str, Any] = {
                "id": index,
                "name": LABELS["object"][index],
                "share": len(pixels) / len(everywhere),
                "pixels": len(pixels),
                "box": [min(columns), min(rows), max(columns) + 1, max(rows) + 1],
            }
            if "part" in maps:
                entry["parts"] = naive_list(maps, pixels, "part", options.min_part_share)
                for part in entry["parts"]:
                    own = [pixel for pixel in pixels if maps["part"][pixel] == part["id"]]
                    part |= {LISTS[task]: naive_list(maps, own, task, options.min_material_share) for task in surfaces}
            entry |= {LISTS[task]: naive_list(maps, pixels, task, options.min_material_share) for task in surfaces}
            report["objects"].append(entry)
    report["objects"].sort(key=lambda entry: -entry["pixels"])
    return report


shares = st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5, 1.0])


@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    tasks=st.sets(st.sampled_from(["object", "part", "material", "texture"]), min_size=1),
    options=st.builds(ReportOptions, st.none() | shares, shares, shares, st.booleans()),
    strip=st.sampled_from([1, 20, 1 << 20]),
)
@settings(deadline=None, max_examples=80)
def test_the_report_is_a_count_of_the_pixels(
    seed: int, height: int, width: int, tasks: set[str], options: ReportOptions, strip: int
) -> None:
    maps = random_maps(seed, height, width, tuple(task for task in LABELS if task in tasks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STRIP", strip)
        report = parsing_report(None, maps, LABELS, options)
    assert report == naive_report(maps, options)


def test_a_scene_and_no_object() -> None:
    nothing = {task: np.zeros((4, 6), np.int32) for task in LABELS if task != "scene"}
    report = parsing_report([(1, 0.75), (0, 0.25)], nothing, LABELS)
    assert report["scene"] == [
        {"id": 1, "name": "street", "probability": 0.75},
        {"id": 0, "name": "field", "probability": 0.25},
    ]
    assert report["objects"] == report["parts"] == report["materials"] == []
    assert report["textures"] == [{"id": 0, "name": "banded", "share": 1.0, "pixels": 24}]
    assert parsing_report(None, nothing, LABELS, ReportOptions(instances=True))["objects"] == []
    assert parsing_report([(0, 1.0)], {}, LABELS) == {"scene": [{"id": 0, "name": "field", "probability": 1.0}]}


def test_small_materials_are_dropped_and_stay_in_the_denominator() -> None:
    """As in the official code, a material of less than 10 % of the object is not listed."""
    material = np.repeat(np.array([[1, 2, 0]], np.uint8), [90, 9, 1], axis=1)
    maps = {"object": np.full((1, 100), 2, np.uint8), "material": material}
    (entry,) = parsing_report(None, maps, LABELS)["objects"]
    assert entry["materials"] == [{"id": 1, "name": "metal", "share": 0.9, "pixels": 90}]
    (entry,) = parsing_report(None, maps, LABELS, ReportOptions(min_material_share=0.09))["objects"]
    assert [each["share"] for each in entry["materials"]] == [0.9, 0.09]


def test_specks_are_no_instances() -> None:
    objects = np.zeros((100, 100), np.uint8)
    objects[10:20, 10:20] = objects[10:20, 40:50] = 3
    objects[60:63, 60:63] = 3  # 0.09 % of the photo
    instances = parsing_report(None, {"object": objects}, LABELS, ReportOptions(instances=True))["objects"]
    assert [entry["box"] for entry in instances] == [[10, 10, 20, 20], [40, 10, 50, 20]]
    every = parsing_report(None, {"object": objects}, LABELS, ReportOptions(instances=True, min_share=0))["objects"]
    assert [entry["pixels"] for entry in every] == [100, 100, 9]


def test_faults() -> None:
    with pytest.raises(ValueError, match="labels run from 0 to 9, but there are 5 classes"):
        parsing_report(None, {"object": np.array([[0, 9]])}, LABELS)
    with pytest.raises(ValueError, match=r"differ in size: \(2, 3\), \(3, 2\)"):
        parsing_report(None, {"object": np.zeros((2, 3), int), "part": np.zeros((3, 2), int)}, LABELS)
    with pytest.raises(ValueError, match="min_share must be at least 0 and at most 1, got 2"):
        ReportOptions(min_share=2)


def test_instances_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match=r"instances need SciPy .*: pip install 'fastuper\[parse\]'"):
        check_instances()
