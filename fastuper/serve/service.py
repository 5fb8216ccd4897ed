"""The work of the page and of its JSON endpoint: a photo in, files and a description of them out."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import numpy as np
from PIL import Image

from fastuper.data.classes import class_name
from fastuper.data.images import ImageError, read_image
from fastuper.data.overlay import format_share, resized, resized_labels
from fastuper.data.panels import TITLES
from fastuper.inference.photos import Found, Layer, PhotoModel, PhotoParser
from fastuper.inference.results import names_of_files
from fastuper.io.messages import about, listed, one_line
from fastuper.serve.files import ResultFiles
from fastuper.serve.models import Models

Result = TypeVar("Result")

VIEW_SIDE, VIEW_LEAST = 1280, 480
"""Photos whose longer side exceeds the first number of pixels are shrunk to it on the page; tiny ones are enlarged."""


class RefusedError(Exception):
    """A photo that gets no result.

    Attributes:
        message: why, on one line.
        status: the status of an answer by HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class Answer(NamedTuple):
    """What was found in a photo.

    Attributes:
        result: the answer of the JSON endpoint; see docs/serve.md.
        view: what the page shows beside it: the photo, and for each layer the classes' numbers as a picture.
    """

    result: dict[str, Any]
    view: dict[str, Any]


class Queue:
    """Runs one piece of work at a time, in a thread of its own; a bounded number waits.

    Args:
        waiting: the number of pieces of work that may wait.
    """

    def __init__(self, waiting: int) -> None:
        self._places = waiting + 1
        self._taken = 0
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "fastuper-serve")

    def check(self) -> None:
        """Raise RefusedError if no place is free."""
        if self._taken >= self._places:
            waiting = self._places - 1
            raise RefusedError(f"the queue is full ({waiting} photos wait): try again in a moment", 503)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Return the result of a piece of work when its turn has come; work that was cancelled while it waited is left.

        Raises:
            RefusedError: the queue is full.
        """
        with self._lock:
            self.check()
            self._taken += 1
        try:
            future = self._thread.submit(work)
        except BaseException:
            self._leave()
            raise
        future.add_done_callback(self._leave)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the thread after the piece of work that runs now."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _leave(self, _: Future[Any] | None = None) -> None:
        with self._lock:
            self._taken -= 1


class Service:
    """Runs models on photos.

    Args:
        models: the models.
        results: where the files of the results go.
        max_pixels: the limit on a photo's width x height.
        waiting: the number of photos that may wait.
    """

    def __init__(self, models: Models, results: ResultFiles, *, max_pixels: int, waiting: int) -> None:
        self.models = models
        self.results = results
        self.max_pixels = max_pixels
        self.queue = Queue(waiting)

    def check_model(self, name: str) -> None:
        """Raise RefusedError if no model has this name."""
        if name not in self.models.names:
            raise RefusedError(
                f"there is no model {one_line(name)} here; known are {listed(self.models.names, 8)}", 404
            )

    async def answer(self, path: Path, name: str, model: str) -> Answer:
        """Run a model on a photo.

        Args:
            path: the photo's file.
            name: the photo's name.
            model: the model's name.

        Raises:
            RefusedError: the queue is full, there is no such model, the photo cannot be used, or memory or disk are
                full.
        """
        self.check_model(model)
        return await self.queue.run(lambda: self._run(path, name, model))

    def _run(self, path: Path, name: str, model_name: str) -> Answer:
        start = time.perf_counter()
        try:
            model = self.models.get(model_name)
            photo = read_image(path, max_pixels=self.max_pixels)
            found = model.find(photo)
            with self.results.new() as (key, folder):
                files = _write(model, name, photo, found, folder)
                address = f"/results/{key}/"
                classes = {task: _classes(layer) for task, layer in found.layers.items()}
                result = {
                    "photo": name,
                    "width": photo.width,
                    "height": photo.height,
                    "model": model_name,
                    "scene": _scenes(model, found),
                    "layers": classes,
                    "files": {ending: address + quote(file) for ending, file in files.items()},
                }
                view = _write_view(photo, found.layers, classes, folder, address)
        except ImageError as error:
            raise RefusedError(about(name, str(error).removeprefix(f"{path}: ")), 400) from None
        except Exception as error:  # of any model: the page goes on
            raise RefusedError(about(name, error), 500) from None
        return Answer(result, view | {"seconds": time.perf_counter() - start})


def plain_name(name: str) -> str:
    """Return a photo's name without folders and control characters; `photo` if nothing is left."""
    name = name.replace("\\", "/").rpartition("/")[2]
    name = "".join(letter if letter.isprintable() else "_" for letter in name)
    return name if name.strip(". ") else "photo"


def _write(model: PhotoModel, name: str, photo: Image.Image, found: Found, folder: Path) -> dict[str, str]:
    """Write the files that the commands write; return their names, by what they are."""
    stem = os.path.splitext(name)[0]
    names = dict(zip(model.endings, names_of_files(stem, 1, model.endings), strict=True))
    written = {ending: names[ending] for ending in model.written}
    model.write(name, photo, found, {ending: folder / file for ending, file in written.items()})
    return {ending.removeprefix("_"): file for ending, file in written.items()}


def _scenes(model: PhotoModel, found: Found) -> list[dict[str, Any]] | None:
    if found.scene is None or not isinstance(model, PhotoParser):
        return None
    names = model.labels["scene"]
    return [{"class": index, "name": names[index], "share": share} for index, share in found.scene]


def _classes(layer: Layer) -> list[dict[str, Any]]:
    """Return the classes that occur, largest first, with their colours."""
    return [each | {"colour": "#" + bytes(layer.palette[each["class"]]).hex()} for each in layer.shares()]


def _write_view(
    photo: Image.Image,
    layers: Mapping[str, Layer],
    classes: Mapping[str, list[dict[str, Any]]],
    folder: Path,
    address: str,
) -> dict[str, Any]:
    """Write the photo and the label maps in the size of the page; return what the page needs to know.

    A label map becomes a PNG whose red and green are the low and high byte of a class's place in the list of classes.
    """
    shown = resized(photo, VIEW_SIDE, VIEW_LEAST)
    shown.save(folder / "view.jpg", quality=90)
    views = []
    for task, layer in layers.items():
        present = classes[task]
        places = np.zeros(len(layer.palette), np.uint16)
        places[[each["class"] for each in present]] = np.arange(len(present))
        numbers = places[resized_labels(layer.labels, shown.height, shown.width)]
        pixels = np.stack([numbers & 255, numbers >> 8, np.zeros_like(numbers)], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"view_{task}.png", compress_level=1)
        names = {each["class"]: each["name"] for each in present}
        views.append(
            {
                "title": TITLES.get(task, "Classes"),
                "picture": f"{address}view_{task}.png",
                "classes": [
                    {"name": class_name(names, each["class"]), "share": format_share(each["share"])}
                    | {"colour": each["colour"]}
                    for each in present
                ],
            }
        )
    return {"picture": f"{address}view.jpg", "layers": views}


def shown_scenes(scenes: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Return scenes as text for the page."""
    return [f"{class_name({0: each['name']}, 0)} {format_share(each['share'])}" for each in scenes or ()]
