"""The start of a training run: the splits of a dataset, their classes, and a model for them.

`fastuper train` uses these functions; each takes `notify`, which is called with lines that a user should read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import torch
from tqdm import tqdm

from fastuper.data.classes import classes_of
from fastuper.data.folders import SPLIT_NAMES, FolderDataset, Layout, find_splits, open_dataset
from fastuper.data.label_check import LabelsSeen, check_numbers, one_class, see_labels
from fastuper.data.processor import UperNetImageProcessor
from fastuper.data.samples import IGNORE_INDEX, DataError, checked_classes
from fastuper.evaluation.loop import check_classes
from fastuper.io.hub import find_file
from fastuper.io.messages import listed, reason
from fastuper.models.backbones.foreign import TIMM
from fastuper.models.backbones.foreign.measuring import black_image, evaluating
from fastuper.models.configuration import ForeignBackboneConfig
from fastuper.models.upernet import UperNetForSemanticSegmentation
from fastuper.models.upernet_configuration import UperNetConfig, named_backbone_config
from fastuper.recipes.recipes import BACKBONES
from fastuper.weights.convert import read_converted
from fastuper.weights.dialects import is_foreign
from fastuper.weights.errors import CheckpointError


def ignore_note(message: str) -> None:
    """Print nothing; the default of `notify`."""


def open_splits(
    data: str | os.PathLike[str],
    layout: Layout = "auto",
    split: str | None = None,
    validation_split: str | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    notify: Callable[[str], None] = ignore_note,
) -> tuple[FolderDataset, FolderDataset | None]:
    """Open the training data and the validation data of a folder.

    Args:
        data: the folder; see `fastuper.data.folders.open_dataset`.
        layout: the layout of the folder.
        split: the split to train on; None means training if the folder has splits, and the whole folder if it has none.
        validation_split: the split to validate on; None means validation if the folder has it.
        ignore_index: the label of ignored pixels.
        notify: called with a line about the data.

    Returns:
        The training data, and the validation data or None.

    Raises:
        DataError: the folder cannot be used, or has no such split.
    """
    splits = find_splits(data, layout)
    if validation_split is None and not {*splits} & {*SPLIT_NAMES[1]}:
        if splits or split is not None:
            notify(
                f"{data} has no split validation: training without validation; --validation-split (validation_split) "
                "names a split"
            )
        else:
            notify(f"{data} has no splits: training on all photos, without validation")
        return open_dataset(data, split or ("training" if splits else None), layout, ignore_index=ignore_index), None
    training, validation = (
        open_dataset(data, name, layout, ignore_index=ignore_index)
        for name in (split or "training", validation_split or "validation")
    )
    notify(f"{len(training)} photos to train on, {len(validation)} to validate on")
    return training, validation


def find_classes(
    training: FolderDataset,
    validation: FolderDataset | None = None,
    model: str | os.PathLike[str] | None = None,
    *,
    notify: Callable[[str], None] = ignore_note,
) -> dict[int, str]:
    """Return the classes of data without class names: the model's, or numbered classes if the model's are too few.

    Args:
        training: the training data; all of its label maps are read.
        validation: the validation data; all of its label maps are read too.
        model: a checkpoint's folder or Hub id.
        notify: called with a line about the names.

    Raises:
        ValueError: there is one class only, most numbers are in no label map, or the ignored label would be a class.
        ImageError: a label map cannot be read.
    """
    seen = LabelsSeen()
    datasets = [training] if validation is None else [training, validation]
    with tqdm(total=sum(map(len, datasets)), desc="counting classes", unit="file", leave=False, disable=None) as bar:
        for dataset in datasets:
            for _ in see_labels(dataset, range(len(dataset)), seen):
                bar.update()
    if len(seen.classes) < 2:
        raise DataError(one_class(training, seen))
    highest = max(seen.classes)
    if model is not None:
        names = classes_of(_read_checkpoint(model)[0])
        if highest < len(names):
            notify(f"the data names no classes: using the names of {model}; classes.txt, one name a line, sets others")
            return names
    check_numbers(seen, notify)
    classes = {index: f"class {index}" for index in range(highest + 1)}
    checked_classes(classes, training.ignore_index)
    notify(f"the data names no classes: numbering {highest + 1}; classes.txt, one name a line, names them")
    return classes


def build_model(
    id2label: dict[int, str],
    *,
    model: str | os.PathLike[str] | None = None,
    backbone: str = "convnext-tiny",
    hidden_size: int = 512,
    drop_path_rate: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    image_size: int = 512,
    notify: Callable[[str], None] = ignore_note,
) -> tuple[UperNetForSemanticSegmentation, UperNetImageProcessor]:
    """Build a network for the classes of a dataset, from a checkpoint or over a backbone.

    If the number of classes of a checkpoint differs, its classifiers are reinitialised. If only the names differ, their
    weights are kept. A checkpoint of one class stays so for data of two classes: labels 0 and 1.

    Args:
        id2label: the names of the data's classes.
        model: a UPerNet checkpoint's folder or Hub id; None builds a new UPerNet.
        backbone: the backbone of a new UPerNet: a name of `fastuper.recipes.BACKBONES` (random weights), a folder or
            Hub id (the checkpoint's weights; any model type of ours or of Transformers' `AutoBackbone`), or "timm/NAME"
            (timm's weights; NAME may have a tag, "vit_base_patch16_224.mae").
        hidden_size: channels of a new UPerNet's decode head; its auxiliary head has half as many.
        drop_path_rate: stochastic depth; None keeps the backbone's own rate.
        ignore_index: the label of ignored pixels.
        image_size: the size (pixels, square) that the processor resizes to, unless the checkpoint has a processor. A
            timm backbone that takes images of one size only is built for this size.
        notify: called with a line about the weights.

    Returns:
        The network, in float32, and the image processor to save beside it. New weights are drawn from torch's global
        random numbers.

    Raises:
        OSError: a checkpoint cannot be loaded.
        ValueError: the classes are the checkpoint's in another order; the backbone has no `drop_path_rate`, is of no
            known name, or takes no images of `image_size`.
    """
    common: dict[str, Any] = {"id2label": id2label, "loss_ignore_index": ignore_index}
    heads: dict[str, Any] = {"hidden_size": hidden_size, "auxiliary_channels": hidden_size // 2}
    if model is not None:
        config, tensors = _read_checkpoint(model)
        if config.num_labels == 1 and len(id2label) == 2:
            common["id2label"] = {0: id2label[1]}
        elif config.num_labels != len(id2label):
            notify(
                f"{model} has {config.num_labels} classes and the data {len(id2label)}: "
                "the classifiers are reinitialised"
            )
        elif id2label != (names := classes_of(config)):
            check_classes(id2label, names)  # the same names in another order would silently have the wrong weights
            notify(f"the data and {model} have different class names: the classifiers keep their weights, by number")
        config = UperNetConfig.from_dict(config.to_dict(), **common)
    elif backbone in BACKBONES:
        config = UperNetConfig(BACKBONES[backbone](), **common, **heads)
        notify(f"{backbone} starts with random weights")
    else:
        _check_name(backbone)
        name = backbone.removeprefix("timm/")
        config = UperNetConfig(
            backbone=name, use_timm_backbone=name != backbone, use_pretrained_backbone=True, **common, **heads
        )
    if drop_path_rate is not None:
        set_drop_path_rate(config, drop_path_rate)
    if model is None:
        network = _over_backbone(config, image_size, notify)
    else:
        loaded: Any = UperNetForSemanticSegmentation.from_pretrained(
            None if tensors else model,
            config=config,
            state_dict=tensors,
            dtype="float32",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        network, info = loaded
        classifiers = {name for name, _, _ in info["mismatched_keys"] if ".classifier." in name}
        others = {name for name, _, _ in info["mismatched_keys"]} | info["missing_keys"]
        wrong = [name for name in sorted(others - classifiers) if not name.startswith("auxiliary_head.")]
        if wrong := [name for name in wrong if not name.endswith("num_batches_tracked")]:
            raise CheckpointError(
                f"{model} lacks {len(wrong)} of the model's tensors, or has them in other shapes, such as "
                f"{listed(wrong, 2)}; give a whole UPerNet, or its backbone as --backbone"
            )
        if tensors or find_file(model, "preprocessor_config.json"):
            return network, UperNetImageProcessor.from_pretrained(model)
    return network, UperNetImageProcessor(size={"height": image_size, "width": image_size})


def _check_name(backbone: str) -> None:
    """Refuse a name that is neither a folder, an id of a Hub repository ("owner/name") nor "timm/NAME"."""
    if "/" in backbone or os.path.isdir(backbone):
        return
    close = get_close_matches(backbone, BACKBONES, 2)
    if find_spec("timm"):
        from timm import list_models

        close += [f"timm/{name}" for name in get_close_matches(backbone, list_models(), 2)]
    hint = f"like {listed(close, 4)}?" if close else f"names are {listed(BACKBONES, 5)}"
    raise ValueError(
        f"no backbone {backbone!r}, {hint} Give one of these names, a folder, a Hub id (owner/name) or timm/NAME"
    )


def _over_backbone(
    config: UperNetConfig, image_size: int, notify: Callable[[str], None]
) -> UperNetForSemanticSegmentation:
    """Return a new UPerNet for images of one size; its backbone, if it takes only one size, is built for it.

    Raises:
        ValueError: the backbone takes no images of this size.
    """
    network: UperNetForSemanticSegmentation = UperNetForSemanticSegmentation(config)
    kwargs = config.backbone_kwargs or {}
    if config.use_timm_backbone and "img_size" not in kwargs and (fault := _fault_at(network, image_size)):
        config.backbone_kwargs = {**kwargs, "img_size": image_size}
        try:
            network = UperNetForSemanticSegmentation(config)
        except ValueError as error:
            raise ValueError(
                f"{fault}; and it cannot be built for {image_size} x {image_size} pixels: train with a smaller --crop "
                "(image_size)"
            ) from error
        notify(f"{config.backbone} is built for images of {image_size} x {image_size} pixels and no larger")
    padded = network.image_sizes.padded(image_size, image_size)
    if padded != (image_size, image_size):
        notify(f"images of {image_size} x {image_size} pixels are padded to {padded[0]} x {padded[1]} for the backbone")
    return network


def _fault_at(network: UperNetForSemanticSegmentation, image_size: int) -> str:
    """Return why a backbone takes no square images of a size; "" if it takes them."""
    largest = network.image_sizes.largest
    if largest is not None and largest != (image_size, image_size):
        return f"{network.image_sizes.name} takes images of {largest[0]} x {largest[1]} pixels only"
    with evaluating(network):
        channels: int = network.config.backbone_config.values.get("num_channels", 3)
        image = network.image_sizes.pad(black_image(network, channels, (image_size, image_size)))
        try:
            network.backbone(image)
        except (RuntimeError, ValueError) as error:
            return reason(error)
    return ""


def _read_checkpoint(
    model: str | os.PathLike[str],
) -> tuple[UperNetConfig, Mapping[str, torch.Tensor] | None]:
    """Return a checkpoint's configuration; of another library's checkpoint also its tensors, converted."""
    if not is_foreign(model):
        return UperNetConfig.from_pretrained(model), None
    conversion = read_converted(model)
    if conversion.kind != "upernet":
        raise CheckpointError(
            f"{model} is {conversion.dialect}, no UPerNet; `fastuper convert` makes a --backbone of it"
        )
    return UperNetConfig.from_dict(dict(conversion.config)), conversion.tensors


def set_drop_path_rate(config: UperNetConfig, rate: float) -> None:
    """Set the stochastic depth of a configuration's backbone, in place.

    Raises:
        ValueError: the backbone's configuration has no `drop_path_rate`. timm's models refuse it when they are built.
    """
    backbone = config.backbone_config or named_backbone_config(config)
    if backbone.model_type != TIMM and not hasattr(backbone, "drop_path_rate"):
        raise ValueError(
            f"the configuration of a {backbone.model_type} has no drop_path_rate; leave out --drop-path "
            "(drop_path_rate)"
        )
    if config.backbone_config is None:
        config.backbone_kwargs = {**(config.backbone_kwargs or {}), "drop_path_rate": rate}
    elif isinstance(backbone, ForeignBackboneConfig):
        backbone.values["drop_path_rate"] = rate
    else:
        backbone.drop_path_rate = rate
