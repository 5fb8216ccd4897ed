"""Loads a checkpoint and its image processor for use on photos; every fault is an error of one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastuper.data.processor import UperNetImageProcessor
from fastuper.io.files import read_json
from fastuper.io.hub import find_file
from fastuper.io.messages import name_of, one_line
from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing
from fastuper.models.upernet import UperNetForSemanticSegmentation
from fastuper.scenes.dataset import MODEL
from fastuper.weights.dialects import is_foreign
from fastuper.weights.official import has_official_files

KINDS = {
    "upernet": ("semantic segmentation", "segment"),
    "fastuper_upernet": ("semantic segmentation", "segment"),
    "unified_perceptual_parsing": ("Unified Perceptual Parsing", "parse"),
}
"""What a model is for, and the command that runs it on photos, by the `model_type` in config.json."""

_FAULTS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)


class LoadError(ValueError):
    """A model that cannot be loaded, or a device that cannot be used; the message is one line."""


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" chooses a GPU if there is one.

    Raises:
        LoadError: the device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LoadError(f"--device {name} cannot be used: {one_line(error)}") from None
    return device


def load(
    network_class: Any, model: str | None, device: torch.device, dtype: str, notify: Callable[[str], None]
) -> tuple[Any, UperNetImageProcessor]:
    """Load a checkpoint, in evaluation mode, and its image processor.

    Args:
        network_class: the class of the model.
        model: a folder, the id of a Hub repository, or the checkpoint of another library; None for the demo model.
        device: the model's device.
        dtype: the name of the floating-point type; "auto" for that of the stored weights.
        notify: is called with a line if the checkpoint has no image processor.

    Raises:
        LoadError: there is no such model, it is damaged or for another class, or it needs more memory than there is.
    """
    if model is None:
        model = str(MODEL)
        if dtype == "auto":
            dtype = "float32"  # the weights are stored in bfloat16 to be small
    try:
        kind = _kind(model)
        for model_type, (task, command) in KINDS.items():
            if kind == model_type and not network_class.config_class.reads(kind):
                raise ValueError(f"it is a model for {task}; use it with `fastuper {command}`")
        network = network_class.from_pretrained(model, dtype=dtype, device=device).eval()
        if is_foreign(model) or find_file(model, "preprocessor_config.json"):
            return network, UperNetImageProcessor.from_pretrained(model)
    except _FAULTS as error:
        raise _error(model, error) from None
    notify(f"{model} has no preprocessor_config.json: photos are prepared with the default settings")
    return network, UperNetImageProcessor()


def class_of(model: str | None) -> Any:
    """Return the class of a checkpoint's model, by its config.json; nothing else is read.

    Another library's checkpoint is taken for one of semantic segmentation, except the official code's folder.

    Raises:
        LoadError: there is no such checkpoint, or its model is no UPerNet.
    """
    try:
        kind = "upernet" if model is None else _kind(model)
        if model is not None and is_foreign(model):
            official = os.path.isdir(model) and has_official_files(Path(model))
            kind = "unified_perceptual_parsing" if official else "upernet"
    except _FAULTS as error:
        raise _error(str(model), error) from None
    return (
        UperNetForUnifiedPerceptualParsing if kind == "unified_perceptual_parsing" else UperNetForSemanticSegmentation
    )


def _kind(model: str) -> Any:
    """Return the `model_type` in a checkpoint's config.json; None if there is none, or it is another library's."""
    config = None if is_foreign(model) else find_file(model, "config.json")
    return read_json(config).get("model_type") if config else None


def _error(model: str, error: Exception) -> LoadError:
    return LoadError(f"cannot load the model {name_of(model)}: {one_line(error)}")
