"""What mmsegmentation's settings say besides the network: classes, preprocessing, and how the checkpoint was tested.

Version 1.x normalizes in `data_preprocessor`, 0.x in the step `Normalize` of the pipelines (`img_norm_cfg`). Both read
images with OpenCV, in the order BGR, 0 to 255.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastuper.weights.conversion import Choices, Source

Settings = Mapping[str, Any]

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
"""ImageNet's, in RGB order: those of nearly all checkpoints."""

REDUCING = ("ADE20KDataset", "PascalContextDataset59", "ISPRSDataset", "LoveDADataset", "PotsdamDataset")
"""Datasets of mmsegmentation whose label 0 is ignored unless their settings say otherwise."""

THRESHOLD = 0.3
"""mmsegmentation's probability above which a pixel is of the only class, if the head does not say another."""


def classes_of(source: Source, count: int, choices: Choices) -> dict[str, Any]:
    """Return the values of config.json about classes.

    Args:
        source: the checkpoint, with the names and colours in its metadata.
        count: the channels of its logits.
        choices: gets notes about names that do not fit.
    """
    names, palette = source.classes, source.palette
    if count == 1:
        head = source.settings.get("model", {})
        head = head.get("decode_head", {}) if isinstance(head, Mapping) else {}
        threshold = head.get("threshold") if isinstance(head, Mapping) else None
        threshold = THRESHOLD if threshold is None else threshold
        if threshold != 0.5:
            choices.notes.append(
                f"mmsegmentation labels a pixel where the probability of the only class is above {threshold}; "
                "fastuper labels it above 0.5. The logits are the same"
            )
        if names is not None and len(names) <= 2:
            # Label maps have the background too, as the palette of two classes.
            colours = {"palette": [list(colour) for colour in palette]} if palette and len(palette) == 2 else {}
            return {"id2label": {0: names[-1]}, **colours}
    if names is None or len(names) != count:
        if names is not None:
            choices.notes.append(f"the checkpoint has {len(names)} names for {count} classes; they are left out")
        return {"num_labels": count}
    values: dict[str, Any] = {"id2label": dict(enumerate(names))}
    if palette is not None and len(palette) == count:
        values["palette"] = [list(colour) for colour in palette]
    return values


def tests_of(settings: Settings, model: Settings, choices: Choices) -> dict[str, Any]:
    """Return the crop size of training in config.json, and note a test with sliding windows."""
    test = model.get("test_cfg") or settings.get("test_cfg")
    if isinstance(test, Mapping) and test.get("mode") == "slide":
        window, step = _text(test.get("crop_size")), _text(test.get("stride"))
        choices.notes.append(
            f"mmsegmentation tests this checkpoint in windows of {window}, {step} apart, and averages them; fastuper "
            "reads the whole image at once"
        )
    crop = crop_size(settings, model)
    return {} if crop is None else {"crop_size": crop}


def preprocessing_of(settings: Settings, model: Settings, channels: int, choices: Choices) -> dict[str, Any]:
    """Return the values of preprocessor_config.json.

    Args:
        settings: of the checkpoint.
        model: its part `model`.
        channels: of an image.
        choices: settle what the settings do not say.

    Returns:
        Mean and standard deviation are divided by 255, as images are. Without settings about the size, it is left out.
    """
    norm = _normalization(settings, model)
    values: dict[str, Any] = {}
    if channels == 3:
        stored = None
        if norm is not None:
            # A conversion in either direction swaps the channels of images that were read as BGR.
            swaps = norm.get("to_rgb", norm.get("bgr_to_rgb") or norm.get("rgb_to_bgr") or False)
            stored = "rgb" if swaps else "bgr"
        order = choices.settle("channel_order", stored, "rgb")
        if order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order must be rgb or bgr, got {order!r}")
        if order == "bgr":
            values["do_flip_channel_order"] = True
    if norm is not None and norm.get("mean") is None:
        values |= {"rescale_factor": 1.0, "do_normalize": False}  # floats from 0 to 255
    else:
        defaults = (MEAN, STD) if channels == 3 else ([0.0] * channels, [255.0] * channels)
        mean, std = (
            choices.settle(
                name,
                None if norm is None else _per_channel(norm.get(name), channels),
                default[::-1] if "do_flip_channel_order" in values else default,
            )
            for name, default in zip(("mean", "std"), defaults, strict=True)
        )
        values |= {
            "image_mean": [round(value / 255, 12) for value in mean],
            "image_std": [round(value / 255, 12) for value in std],
        }
    padding = _preprocessor(settings, model).get("test_cfg")
    if isinstance(padding, Mapping) and padding:
        choices.notes.append("mmsegmentation pads the images of this checkpoint in tests; fastuper does not pad")
    return {**values, **_size(settings, model, choices), "do_reduce_labels": _reduces_labels(settings)}


def crop_size(settings: Settings, model: Settings) -> list[int] | None:
    """Return the size (height, width) of the images in training, if the settings name it."""
    for value in (
        *(step.get("crop_size") for step in _steps(settings.get("train_pipeline")) if _kind(step) == "RandomCrop"),
        _preprocessor(settings, model).get("size"),
        settings.get("crop_size"),
    ):
        if (size := _pair(value)) is not None:
            return size
    return None


def _normalization(settings: Settings, model: Settings) -> Settings | None:
    """Return the settings with the mean and the order of channels; None if there are none."""
    preprocessor = _preprocessor(settings, model)
    if preprocessor:
        return preprocessor
    for pipeline in ("test_pipeline", "train_pipeline"):
        for step in _steps(settings.get(pipeline)):
            if _kind(step) == "Normalize":
                return step
    norm = settings.get("img_norm_cfg")
    return norm if isinstance(norm, Mapping) else None


def _preprocessor(settings: Settings, model: Settings) -> Settings:
    for value in (model.get("data_preprocessor"), settings.get("data_preprocessor")):
        if isinstance(value, Mapping) and value:
            return value
    return {}


def _per_channel(value: Any, channels: int) -> list[float] | None:
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if not numbers or not all(isinstance(number, int | float) for number in numbers):
        return None
    return [float(number) for number in (numbers * channels if len(numbers) == 1 else numbers)]


def _size(settings: Settings, model: Settings, choices: Choices) -> dict[str, Any]:
    """Return the options about the size of test images: of the step that resizes, or the crop size of training.

    A Resize that keeps the aspect ratio takes the largest image whose longer side is at most the larger number, and
    whose shorter side is at most the smaller, as ResizeShortestEdge does. One that does not keep it takes (width,
    height). Without such a step, images keep their size. Steps that a size cannot say become notes.
    """
    steps = _steps(settings.get("test_pipeline"))
    outer = next((step for step in steps if _kind(step) == "MultiScaleFlipAug"), None)  # of 0.x
    resize = next((step for step in steps if _kind(step) in ("Resize", "ResizeShortestEdge")), None)
    for step in steps:
        if _kind(step) == "ResizeToMultiple":
            divisor = step.get("size_divisor", 32)
            choices.notes.append(
                f"mmsegmentation stretches test images to multiples of {divisor} pixels; fastuper does with "
                f"size_divisor={divisor} of the image processor"
            )
    if steps and resize is None:
        return {"do_resize": False}
    if resize is not None and _kind(resize) == "ResizeShortestEdge":
        short, longest = _pair(resize.get("scale")), resize.get("max_size")
        if short is not None and type(longest) is int:
            return {"size": {"shortest_edge": min(short), "longest_edge": longest}}
    elif resize is not None:
        scale = resize.get("scale", resize.get("img_scale", outer.get("img_scale") if outer else None))
        if isinstance(scale, list | tuple) and scale and isinstance(scale[0], list | tuple):
            scale = scale[0]
        if (pair := _pair(scale)) is not None:
            if resize.get("keep_ratio", outer is not None or "img_scale" in resize):
                return {"size": {"shortest_edge": min(pair), "longest_edge": max(pair)}}
            return {"size": {"height": pair[1], "width": pair[0]}}
        if scale is None:
            factor = resize.get("scale_factor", 1.0)
            if factor != 1.0:
                choices.notes.append(
                    f"mmsegmentation resizes test images by the factor {factor}; fastuper does not resize them: do so "
                    "before"
                )
            return {"do_resize": False}
    crop = crop_size(settings, model)
    return {} if crop is None else {"size": {"height": crop[0], "width": crop[1]}}


def _reduces_labels(settings: Settings) -> bool:
    """Return True if label 0 of the dataset is ignored, and every other label one less."""
    said = [step["reduce_zero_label"] for step in _dictionaries(settings) if "reduce_zero_label" in step]
    if said:
        return any(value is True for value in said)
    return any(_kind(step) in REDUCING for step in _dictionaries(settings)) or settings.get("dataset_type") in REDUCING


def _dictionaries(value: Any) -> Iterator[Settings]:
    """Yield every dictionary of the settings, at any depth."""
    if isinstance(value, Mapping):
        yield value
        for part in value.values():
            yield from _dictionaries(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _dictionaries(part)


def _steps(pipeline: Any) -> list[Settings]:
    """Return the steps of a pipeline, those inside MultiScaleFlipAug after it."""
    steps: list[Settings] = []
    for step in pipeline if isinstance(pipeline, list | tuple) else ():
        if isinstance(step, Mapping):
            steps.append(step)
            if _kind(step) == "MultiScaleFlipAug":
                steps += _steps(step.get("transforms"))
    return steps


def _kind(step: Settings) -> str:
    return str(step.get("type", "")).rpartition(".")[2]


def _pair(value: Any) -> list[int] | None:
    pair = [value, value] if type(value) is int else value
    if isinstance(pair, list | tuple) and len(pair) == 2 and all(type(side) is int and side > 0 for side in pair):
        return list(pair)
    return None


def _text(value: Any) -> str:
    pair = _pair(value)
    return "an unknown size" if pair is None else f"{pair[0]} x {pair[1]} pixels"
