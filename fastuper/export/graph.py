"""The module that is exported: from images to logits or label maps, as a graph with named inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from fastuper.export.bands import LARGEST, Chain, Size, Step, blocks, first_of
from fastuper.export.preprocessing import Preprocessing
from fastuper.export.settings import ExportError, ExportSettings
from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing
from fastuper.models.upernet import UperNetForSemanticSegmentation
from fastuper_kernels.dispatch.modes import for_all_sizes, is_jit_tracing
from fastuper_kernels.dispatch.torch_private import check_size
from fastuper_kernels.ops.upsample_cross_entropy import as_two_classes

# Logits of full size exist for a strip of the label map's rows at a time, and are made in blocks of its columns.
STRIPS = 16
BLOCKS = 8

# Added to the logit of a part that the pixel's object does not have: below every logit.
NEVER = -1e30

Choice: TypeAlias = Callable[[torch.Tensor], Sequence[torch.Tensor]]


class Graph(nn.Module):
    """A model as one function of tensors: what an exporter traces.

    Inputs, in this order, by the settings:

    - `pixel_values` (B, C, H, W), float32, normalised; or with `with_preprocessing` `images` (B, H, W, 3), uint8, RGB;
    - with `target_size`: `target_size` (2,), int64, the height and width of the label maps, from 1 to 16,384.

    Outputs, in this order, by model and settings:

    - UPerNet: `logits` (B, classes, H, W), float32; or `labels` (B, height, width), uint8 (int32 above 256 classes);
    - Unified Perceptual Parsing: the logits of each task by its name, or for `labels` the probabilities of the scenes
      (B, scenes) and the label map of each other task. Logits of maps have the size of the first feature map.

    Logits have the size of the network's input, label maps that of the image or photo, or `target_size`. The values are
    those of the model's `forward`, `segment` and `parse`.

    Args:
        model: in evaluation mode, in the dtype of the settings.
        settings: what to compute.
        processor: the model's image processor; needed with `with_preprocessing`.

    Raises:
        ExportError: the settings ask for what the model or the processor cannot do; the message names the option.
    """

    penalties: torch.Tensor
    part_names: torch.Tensor

    def __init__(self, model: nn.Module, settings: ExportSettings, processor: Any = None):
        super().__init__()
        if not isinstance(model, UperNetForSemanticSegmentation | UperNetForUnifiedPerceptualParsing):
            raise ExportError(f"a {type(model).__name__} is no UPerNet or parsing model of fastuper")
        self.model, self.settings, self.processor = model, settings, processor
        self.preprocessing = None
        if settings.with_preprocessing:
            if processor is None:
                raise ExportError("with_preprocessing needs the model's image processor")
            self.preprocessing = Preprocessing(processor)
        self.input_names = ["images" if settings.with_preprocessing else "pixel_values"]
        if settings.target_size:
            if not settings.labels:
                raise ExportError("target_size is the size of label maps: set labels too")
            self.input_names.append("target_size")
        if isinstance(model, UperNetForSemanticSegmentation):
            self.output_names = ["labels" if settings.labels else "logits"]
            return
        config = model.config
        self.output_names = list(config.tasks)
        if settings.labels and "part" in config.tasks:
            if "object" not in config.tasks:
                raise ExportError("labels of parts depend on objects, and the model has no task 'object'")
            channels = config.num_channels_of("part")
            allowed, names = _parts(len(config.labels["object"]), channels, config.part_slices, config.object_parts)
            self.register_buffer("penalties", (~allowed).float() * NEVER, persistent=False)
            self.register_buffer("part_names", names, persistent=False)

    @for_all_sizes
    def forward(
        self, images: torch.Tensor, target_size: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the outputs; a tuple if there are several."""
        photo = images.shape[2:]
        if self.preprocessing is not None:
            photo = images.shape[1:3]
            images = self.preprocessing(images)
        pixels = images.to(self.model.dtype)
        if not self.settings.labels:
            return self._logits(pixels)
        target = _sizes(target_size) if target_size is not None else None
        if target is None and self.preprocessing is not None:
            target = (photo[0], photo[1])
        if isinstance(self.model, UperNetForSemanticSegmentation):
            return self._labels(pixels, target)
        return self._parsing_labels(pixels, target)

    def _logits(self, pixels: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        output = self.model(pixels, return_dict=True)
        found = tuple(output[name].float() for name in self.output_names)
        return _only(found)

    def _labels(self, pixels: torch.Tensor, target: tuple[Size, Size] | None) -> torch.Tensor:
        """Return UPerNet's label maps: the best class of logits resampled to the images' size, then to `target`."""
        model: Any = self.model
        coarse = model.decode_head(model._features(pixels, False, False)[0])
        classes = as_two_classes(coarse)
        dtype = _label_dtype(classes.shape[1])
        sizes = zip(coarse.shape[2:], pixels.shape[2:], model.image_sizes.padded(*pixels.shape[2:]), strict=True)
        first = [(Step(own, padded, model.align_corners), size) for own, size, padded in sizes]
        if target is None:
            chains = [Chain([step], size) for step, size in first]
        else:
            chains = [Chain([step, Step(size, last)], last) for (step, size), last in zip(first, target, strict=True)]
        return label_maps(classes, chains, lambda x: [x.argmax(-1).to(dtype)])[0]

    def _parsing_labels(
        self, pixels: torch.Tensor, target: tuple[Size, Size] | None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the scenes' probabilities, and the other tasks' label maps, of logits resampled to `target` at once.

        Logits of images that the backbone needs padded are first resampled to the padded size, and cropped.
        """
        model: Any = self.model
        logits = model.decode_head(model._features(pixels, False, False)[0])
        dtypes = {task: _label_dtype(len(model.config.labels[task])) for task in logits}
        target = target or (pixels.shape[2], pixels.shape[3])
        found = {}
        for task, coarse in logits.items():
            best = partial(_best, dtype=dtypes[task])
            if task == "scene":
                found[task] = coarse.float().softmax(1)
            elif task == "object" and "part" in logits:
                both = torch.cat([coarse, logits["part"]], 1)
                choose = partial(self._objects_and_parts, dtypes=dtypes, objects=coarse.shape[1])
                found["object"], found["part"] = label_maps(both, self._chains(both, pixels, target), choose)
            elif task != "part":
                (found[task],) = label_maps(coarse, self._chains(coarse, pixels, target), best)
        return _only(tuple(found[name] for name in self.output_names))

    def _chains(self, coarse: torch.Tensor, pixels: torch.Tensor, target: tuple[Size, Size]) -> list[Chain]:
        """Return the resampling of the rows and of the columns of a parsing model's logits to `target`."""
        sizes = self.model.resampled_sizes(coarse.shape[2:], pixels.shape[2:])
        if sizes is None:
            return [Chain([Step(own, last)], last) for own, last in zip(coarse.shape[2:], target, strict=True)]
        return [
            Chain([Step(own, padded), Step(kept, last)], last)
            for own, padded, kept, last in zip(coarse.shape[2:], *sizes, target, strict=True)
        ]

    def _objects_and_parts(
        self, logits: torch.Tensor, objects: int, dtypes: Mapping[str, torch.dtype]
    ) -> list[torch.Tensor]:
        """Return label maps (...) of logits (..., channels): the best object, and the best of this object's parts."""
        parts = logits[..., objects:]
        best = logits[..., :objects].argmax(-1)
        place = (parts + self.penalties.index_select(0, best.flatten()).reshape(parts.shape)).argmax(-1)
        names = self.part_names.index_select(0, place.flatten()).reshape(place.shape)
        return [best.to(dtypes["object"]), names.to(dtypes["part"])]


def label_maps(logits: torch.Tensor, chains: Sequence[Chain], choose: Choice) -> list[torch.Tensor]:
    """Return label maps of resampled logits, which exist for a strip of rows at a time.

    Args:
        logits: (B, channels, h, w).
        chains: the resampling of the h rows, and of the w columns.
        choose: returns label maps (...) of logits (..., channels).

    Returns:
        Label maps (B, height, width), as many as `choose` returns.
    """
    (batch, channels), (rows, columns) = logits.shape[:2], chains
    strips, tiles = blocks(rows, STRIPS), blocks(columns, BLOCKS)
    reach, width = tiles.inputs.shape[1], BLOCKS * tiles.matrix.shape[1]
    # The channels are last: the largest of neighbours is found faster. All columns that the tiles read, side by side.
    x = logits.float().permute(0, 2, 3, 1).index_select(2, tiles.inputs.flatten()).flatten(2)
    found = []
    for index, matrix in zip(strips.inputs.unbind(), strips.matrix.unbind(), strict=True):
        strip = matrix @ x.index_select(1, index)
        strip = tiles.matrix @ strip.reshape(-1, BLOCKS, reach, channels)
        found.append([labels.reshape(batch, matrix.shape[0], width) for labels in choose(strip)])
    joined = [torch.cat(parts, 1) for parts in zip(*found, strict=True)]
    return [first_of(first_of(labels, 1, rows.size_out), 2, columns.size_out) for labels in joined]


def _best(logits: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    return [logits.argmax(-1).to(dtype)]


def _label_dtype(classes: int) -> torch.dtype:
    """Return the dtype of label maps; ONNX Runtime and OpenVINO compute little in 16-bit integers."""
    return torch.uint8 if classes <= 1 << 8 else torch.int32


def _only(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return outputs if len(outputs) > 1 else outputs[0]


def _sizes(target_size: torch.Tensor) -> tuple[Size, Size]:
    """Return the two values of `target_size`."""
    if is_jit_tracing():
        height, width = target_size.unbind()
        return height, width
    height, width = target_size.tolist()
    for side in (height, width):
        check_size(side >= 1)
        check_size(side <= LARGEST)
    return height, width


def _parts(
    objects: int, channels: int, slices: Mapping[int, slice], object_parts: Mapping[int, Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which channels of the part head belong to an object, (objects, channels), and each channel's part.

    The first channel of an object's slice is "other", part 0. Objects without parts have the first channel of all.
    """
    allowed = torch.zeros(objects, channels, dtype=torch.bool)
    names = torch.zeros(channels, dtype=torch.int64)
    for name, parts in object_parts.items():
        allowed[name, slices[name]] = True
        names[slices[name]] = torch.tensor([0, *parts])
    allowed[~allowed.any(1), 0] = True
    return allowed, names
