"""Unified Perceptual Parsing: scene, objects, parts, materials and textures of an image in one pass."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastuper.data.parsing_labels import WITH_BACKGROUND, known_tasks
from fastuper.io.bounds import plain
from fastuper.models.heads.parsing import ParsingHead
from fastuper.models.inputs import TargetSizes, check_pixels, check_target_sizes
from fastuper.models.label_maps import class_map, part_map
from fastuper.models.memory import within_memory
from fastuper.models.outputs import Parsing, ParsingOutput, known_to_transformers
from fastuper.models.parsing_configuration import (
    UnifiedPerceptualParsingConfig,
    parsing_config_from,
)
from fastuper.models.parsing_loss import check_parsing_labels, parsing_losses
from fastuper.models.pyramid_model import PyramidModel, check_finite
from fastuper.weights.official import Weights, load_parsing, read_official
from fastuper_kernels.dispatch.modes import for_all_sizes
from fastuper_kernels.dispatch.torch_private import BatchNorm
from fastuper_kernels.ops.upsample_argmax import holds_labels, label_dtype


class UperNetForUnifiedPerceptualParsing(PyramidModel):
    """Unified Perceptual Parsing (https://arxiv.org/abs/1807.10221): a backbone, a pyramid, and a head for each task.

    The defaults compute the network of the official code (CSAILVision/unifiedparsing). docs/parsing.md describes the
    tasks and lists the differences.

    Initial values are the official ones: weights of the heads' convolutions Kaiming normal (fan in, ReLU), the bias of
    a classifier uniform within the inverse square root of its fan in, weights of BatchNorm 1 and biases 1e-4. The
    backbone has its own initial values.

    Args:
        config: a `UnifiedPerceptualParsingConfig`, or its dictionary.
        backbone: a module that is the backbone, if the configuration is that of a model of `over`; otherwise None.

    Attributes:
        backbone: its `forward(pixel_values)` returns `feature_maps`, four maps.
        decode_head: `decode_head(feature_maps, tasks=None)` returns {task: logits} and runs only what the tasks need.
    """

    config_class = UnifiedPerceptualParsingConfig
    config: UnifiedPerceptualParsingConfig
    accepts_loss_kwargs = False  # `transformers.Trainer` then averages the losses of the batches of a step

    @classmethod
    def _config_from(cls, config: Any) -> UnifiedPerceptualParsingConfig:
        return parsing_config_from(config)

    @within_memory
    def __init__(self, config: UnifiedPerceptualParsingConfig | Mapping[str, Any], backbone: nn.Module | None = None):
        super().__init__()
        self.config = parsing_config_from(config)
        self.decode_head = ParsingHead(self.config, self._add_backbone(backbone))
        self._complete()

    @classmethod
    def from_official(
        cls,
        folder: str | os.PathLike[str] | None = None,
        *,
        encoder: Weights | None = None,
        decoder: Weights | None = None,
        labels: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        **values: Any,
    ) -> UperNetForUnifiedPerceptualParsing:
        """Build a model from the official code's weights, in evaluation mode.

        The configuration follows from the shapes of the tensors and from the labels. The official code has no texture
        head: name "texture" in `tasks` to have one, with initial values. `fastuper convert` writes a model folder.

        Args:
            folder: has encoder_*.pth and decoder_*.pth, and may have labels.json; see
                `fastuper.weights.official.read_official`.
            encoder: the encoder's file or state dict, in place of the folder's.
            decoder: the decoder's file or state dict, in place of the folder's.
            labels: names of the classes, or the path of a labels.json, in place of the folder's; see `read_official`.
            **values: values of the configuration, such as `pooling="adaptive"`.

        Raises:
            fastuper.weights.errors.CheckpointError: a file is missing, damaged, or does not fit the others.
            ValueError: the labels do not fit the weights, or a value is not valid.
            TypeError: the configuration has no value of a name in `values`.
        """
        checkpoint = read_official(folder, encoder=encoder, decoder=decoder, labels=labels)
        model = cls(cls.config_class.from_dict(checkpoint.values(), **values))
        load_parsing(model, checkpoint.encoder, checkpoint.decoder)
        return model.eval()

    @for_all_sizes
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: Mapping[str, torch.Tensor] | None = None,
        tasks: Sequence[str] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ParsingOutput | tuple[Any, ...]:
        """Compute the logits of the tasks, and with labels their losses.

        A loss is the official one; it is 0 if no image or pixel has a label. The losses of maps compare the logits,
        resampled (bilinear) to the size of the labels, which may have any size; the official code takes labels of the
        logits' size.

        - scene: mean cross entropy over the images with a label;
        - object, material: mean cross entropy over the pixels with a label;
        - part: for each object the mean cross entropy among its parts and "other", over its pixels in the images where
          one of its parts occurs in it; then the sum over objects. Not in a mean: many objects weigh more than few;
        - texture: mean cross entropy over the pixels with a label. The official code has none; here each pixel of an
          image has the image's label, as in the paper.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised; any size.
            labels: {task: labels}, integers, for any of the tasks. Only these tasks have a loss.

                - "scene": (B,); -1 for an image without a label;
                - "object", "material": (B, H, W); 0 for a pixel without a label;
                - "part": (B, H, W), the numbers of parts in `config.labels`; 0 for other parts. They are read inside
                  the labels of "object", which must be given too, but need not be a task that runs;
                - "texture": (B,) or (B, H, W); -1 for no label.
            tasks: the tasks to run; all of the configuration if None, with labels too. To run only the tasks with
                labels, pass `tasks=list(labels)`.
            output_attentions: whether to return the attention weights; the configuration's value if None.
            output_hidden_states: whether to return the backbone's hidden states; the configuration's value if None.
            return_dict: whether to return an output object (True) or its tuple; the configuration's value if None.

        Returns:
            `ParsingOutput`. Logits of maps have the size of the first feature map; of images that the backbone needs
            padded, the images' size. Losses have the logits' dtype
            (float32 under autocast).

        Raises:
            TypeError: pixels or labels are not tensors.
            ValueError: a task is unknown; pixels or labels have a wrong shape, dtype or value. The message names the
                task and the value.
        """
        config = self.config
        pixel_values = check_pixels(pixel_values)
        tasks = config.tasks if tasks is None else known_tasks(tasks, config.tasks)
        targets = None if labels is None else check_parsing_labels(labels, tasks, config, pixel_values.shape[0])
        output_attentions, output_hidden_states, return_dict = self._returned(
            output_attentions, output_hidden_states, return_dict
        )

        maps, hidden_states, attentions = self._features(pixel_values, output_hidden_states, output_attentions)
        logits = self._logits(maps, pixel_values.shape[2:], tasks)
        losses = {} if targets is None else parsing_losses(logits, targets, config)
        loss: Any = sum(config.loss_weights[task] * term for task, term in losses.items()) if losses else None
        terms = {f"{task}_loss": term for task, term in losses.items()}
        output = known_to_transformers(ParsingOutput)(
            loss, **logits, **terms, hidden_states=hidden_states, attentions=attentions
        )
        return output if return_dict else output.to_tuple()

    @for_all_sizes
    @torch.no_grad()
    def parse(
        self,
        pixel_values: torch.Tensor | Sequence[torch.Tensor],
        target_sizes: TargetSizes = None,
        tasks: Sequence[str] | None = None,
        *,
        mask_background: bool = False,
        top: int | None = 5,
        dtype: torch.dtype | None = torch.int64,
    ) -> list[Parsing]:
        """Return the scene of each image, and its maps of objects, parts, materials and textures.

        Label maps are made from the coarse logits: no logits or probabilities of their size exist. The parts of a pixel
        are those of its object. The mode of the model does not change: call `eval()` first.

        Args:
            pixel_values: (B, C, H, W), as for `forward`; or a list of such tensors, the same images at several scales.
                The probabilities of the scales are then averaged, as in the official code.
            target_sizes: (height, width) of the label maps, one an image; if None the size of the (first) images.
            tasks: the tasks to run; all of the configuration if None. Parts need the objects, which then run too.
            mask_background: True to leave class 0, which the official training never has as a target, out of the
                objects and materials; False as in the official code.
            top: the number of scenes; None for all.
            dtype: the integer dtype of the label maps; None for the smallest that holds a task's classes.

        Returns:
            B `Parsing`, with the fields of the tasks.

        Raises:
            TypeError: the pixels are not tensors, or `dtype` is no `torch.dtype`.
            ValueError: a task is unknown, or parts are asked of a model without objects; scales of different images;
                `target_sizes` are not one pair an image of integers from 1; `top` is no number from 1; `dtype` is no
                integer dtype or too small; pixels or logits are not finite.
        """
        config = self.config
        given: Any = pixel_values if isinstance(pixel_values, list | tuple) else [pixel_values]
        scales = [check_pixels(scale) for scale in given or [None]]
        if any(scale.shape[:2] != scales[0].shape[:2] for scale in scales):
            shapes = [tuple(scale.shape) for scale in scales]
            raise ValueError(f"pixel_values must be the same images at several scales, got {shapes}")
        targets = check_target_sizes(target_sizes, scales[0])
        tasks = config.tasks if tasks is None else known_tasks(tasks, config.tasks)
        if "part" in tasks and "object" not in config.tasks:
            raise ValueError("the model has no task 'object', and the parts of a pixel depend on its object")
        top = plain(top)
        if top is not None and (not isinstance(top, int) or isinstance(top, bool) or top < 1):
            raise ValueError(f"top must be a whole number of at least 1, or None for all scenes, got {top!r}")
        run = known_tasks({*tasks, *(("object",) if "part" in tasks else ())}, config.tasks)
        dtypes = {task: _label_dtype(task, len(config.labels[task]), dtype) for task in run if task != "scene"}

        found = [self._logits(self._features(scale, False, False)[0], scale.shape[2:], run) for scale in scales]
        logits = {task: [by_task[task] for by_task in found] for task in run}
        del found
        # Images of one target size are done in one call.
        whole = all(target == targets[0] for target in targets)
        maps: list[dict[str, torch.Tensor]] = []
        for image in [slice(None)] if whole else [slice(i, i + 1) for i in range(len(targets))]:
            part = {task: [x[image] for x in logits[task]] for task in dtypes}
            label_maps = self._label_maps(part, targets[image][0], int(mask_background), dtypes)
            count = len(targets[image])
            maps += [{task: labels[i] for task, labels in label_maps.items()} for i in range(count)]
        check_finite([x for by_scale in logits.values() for x in by_scale], scales)
        scenes = _best_scenes(logits["scene"], top) if "scene" in logits else [None] * len(targets)
        names = {"objects": "object", "parts": "part", "materials": "material", "textures": "texture"}
        return [
            Parsing(scene, **{name: own[task] for name, task in names.items() if task in tasks})
            for scene, own in zip(scenes, maps, strict=True)
        ]

    def _logits(self, maps: Any, size: torch.Size, tasks: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the logits of the tasks; those of maps cropped to images of `size`, if the images were padded."""
        logits = self.decode_head(maps, tasks)
        return {task: x if x.ndim == 2 else self._cropped(x, size) for task, x in logits.items()}

    def _label_maps(
        self,
        logits: Mapping[str, list[torch.Tensor]],
        size: tuple[int, int],
        background: int,
        dtypes: Mapping[str, torch.dtype],
    ) -> dict[str, torch.Tensor]:
        """Return the label maps (B, height, width) of all tasks in `logits`, by task.

        Args:
            logits: {task: logits (B, channels, h, w) for each scale}, objects before parts.
            size: (height, width).
            background: 1 to leave out class 0 of objects and materials.
            dtypes: the dtype of each task's label map.
        """
        config = self.config
        maps: dict[str, torch.Tensor] = {}
        for task, scales in logits.items():
            if task == "part":
                slices, parts = config.part_slices, config.object_parts
                maps[task] = part_map(scales, maps["object"], slices, parts, dtype=dtypes[task])
            else:
                first = background if task in WITH_BACKGROUND else 0
                maps[task] = class_map(scales, size, first=first, dtype=dtypes[task])
        return maps

    def _initialize_tensor(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Fill one parameter or buffer of a module outside the backbone with the official initial value."""
        if isinstance(module, nn.Conv2d) and name == "weight":
            nn.init.kaiming_normal_(tensor, nonlinearity="relu")
        elif isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            nn.init.uniform_(tensor, -bound, bound)
        elif isinstance(module, BatchNorm) and name == "bias":
            nn.init.constant_(tensor, 1e-4)
        else:
            super()._initialize_tensor(module, name, tensor)


def _best_scenes(logits: Sequence[torch.Tensor], top: int | None) -> list[list[tuple[int, float]]]:
    """Return the most probable scenes of each image, by the mean over scales of the softmax of logits (B, classes)."""
    wide = torch.promote_types(logits[0].dtype, torch.float32)
    mean = torch.stack([x.to(wide).softmax(dim=1) for x in logits]).mean(dim=0)
    best = mean.topk(min(top or mean.shape[1], mean.shape[1]), dim=1)
    return [
        list(zip(numbers, values, strict=True))
        for numbers, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _label_dtype(task: str, classes: int, dtype: torch.dtype | None) -> torch.dtype:
    """Return a dtype for the labels of a task; the smallest if None is given.

    Raises:
        ValueError: it is no integer dtype, or too small.
    """
    if dtype is None:
        return label_dtype(classes)
    if not holds_labels(dtype, classes):
        raise ValueError(f"{dtype} does not hold the {classes} labels of {task}")
    return dtype
