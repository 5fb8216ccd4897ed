"""The picture of a parsed photo: its panels, their colours and their places."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage import data

from fastuper.data.panels import LONGEST, NOTHING, parsing_picture, task_palette
from fastuper.data.parsing_labels import TASKS, default_labels

LABELS = default_labels()
SCENE = [(52, 0.5), (7, 0.25), (0, 0.125)]


def maps_of(photo: Image.Image, **numbers: int) -> dict[str, np.ndarray]:
    """Return label maps of one class each."""
    return {task: np.full((photo.height, photo.width), number, np.int32) for task, number in numbers.items()}


def colours(picture: Image.Image) -> set[tuple[int, int, int]]:
    return {colour for _, colour in picture.getcolors(picture.width * picture.height)}


def test_every_class_has_a_colour_of_its_own() -> None:
    for task in TASKS:
        palette = task_palette(task, len(LABELS[task]))
        assert len(np.unique(palette, axis=0)) == len(LABELS[task])
        assert (palette[0].tolist() == [0, 0, 0]) is (task in NOTHING)
    np.testing.assert_array_equal(task_palette("object", 336)[:30], task_palette("object", 30))


def test_a_panel_for_each_task() -> None:
    """A black photo under the colours of each map: each panel shows its class, and the legend its colour."""
    photo = Image.new("RGB", (300, 200))
    numbers = {"object": 335, "part": 12, "material": 25, "texture": 46}
    shown = colours(parsing_picture(photo, SCENE, maps_of(photo, **numbers), LABELS))
    for task, number in numbers.items():
        colour = task_palette(task, len(LABELS[task]))[number]
        assert tuple(colour.tolist()) in shown  # the legend
        assert tuple(int(0.55 * value) for value in colour) in shown  # the photo
    areas = {}
    for tasks in ((), ("object",), ("object", "part", "material"), tuple(numbers)):
        picture = parsing_picture(photo, SCENE, maps_of(photo, **{task: numbers[task] for task in tasks}), LABELS)
        areas[len(tasks)] = picture.width * picture.height
    assert sorted(areas, key=lambda count: areas[count]) == [0, 1, 3, 4]
    with pytest.raises(ValueError, match="nothing to show"):
        parsing_picture(photo, None, {}, LABELS)
    with pytest.raises(ValueError, match="label map of parts"):
        parsing_picture(photo, None, {"part": np.zeros((200, 301), int)}, LABELS)


def test_objects_whose_low_bytes_are_equal_have_different_colours() -> None:
    photo = Image.new("RGB", (200, 100))
    objects = np.where(np.arange(200) < 100, 300, 300 - 256)[None].repeat(100, axis=0)
    shown = colours(parsing_picture(photo, None, {"object": objects}, LABELS))
    palette = task_palette("object", len(LABELS["object"]))
    assert {tuple(palette[number].tolist()) for number in (300, 44)} <= shown


@pytest.mark.parametrize(
    ("size", "side"), [((1, 1), 640), ((90, 60), 630), ((512, 512), 512), ((3000, 2), LONGEST), ((2, 3000), LONGEST)]
)
def test_photos_of_every_size_are_visible(size: tuple[int, int], side: int) -> None:
    photo = Image.fromarray(data.coffee()).resize(size)
    picture = parsing_picture(photo, SCENE, maps_of(photo, object=3, part=0, material=0, texture=0), LABELS)
    assert min(picture.size) > 300 or min(size) < 20
    assert side < max(picture.size) < 4000
    alone = parsing_picture(photo, None, maps_of(photo, object=3), LABELS)
    assert max(alone.size) - side < 400
