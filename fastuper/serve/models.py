"""The models that the page offers; one of them is in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastuper.inference.loading import class_of, load
from fastuper.inference.photos import PhotoModel, PhotoParser, PhotoSegmenter
from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing

DEMO = "demo"
"""The name of the package's own model."""


class _Choice(NamedTuple):
    source: str | None
    network_class: Any


class Models:
    """Checkpoints by name; the last that was asked for is in memory. For one thread.

    Args:
        sources: folders, ids of Hub repositories, or checkpoints of other libraries; none for the package's own model.
        device: the device to compute on.
        dtype: the name of the floating-point type; "auto" for that of the stored weights.
        notify: is called with a line about a model that was loaded.

    Attributes:
        parsing: the names of the models for Unified Perceptual Parsing.

    Raises:
        LoadError: there is no such checkpoint, or the first cannot be loaded.
    """

    def __init__(self, sources: Sequence[str], device: torch.device, dtype: str, notify: Callable[[str], None]) -> None:
        self._choices = {source: _Choice(source, class_of(source)) for source in sources}
        self._choices = self._choices or {DEMO: _Choice(None, class_of(None))}
        self._device, self._dtype, self._notify = device, dtype, notify
        self._loaded: tuple[str, PhotoModel] | None = None
        self.names = list(self._choices)
        self.parsing = {name for name in self.names if self._choices[name].network_class is _PARSING}
        self.get(self.names[0])

    def get(self, name: str) -> PhotoModel:
        """Return a model; if another is in memory, it is dropped first.

        Raises:
            KeyError: no model has this name.
            LoadError: the model cannot be loaded.
        """
        choice = self._choices[name]
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            gc.collect()
            network, processor = load(choice.network_class, choice.source, self._device, self._dtype, self._notify)
            if name in self.parsing:
                self._loaded = name, PhotoParser(network, processor, name)
            else:
                self._loaded = name, PhotoSegmenter(network, processor)
        return self._loaded[1]


_PARSING = UperNetForUnifiedPerceptualParsing
