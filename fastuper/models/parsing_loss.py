"""The losses of Unified Perceptual Parsing, and the checks of their labels.

The formulas are those of the official code (CSAILVision/unifiedparsing, `models/models.py`). There a mean over no
pixels is NaN; here it is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from fastuper.data.parsing_labels import WITH_BACKGROUND
from fastuper.io.messages import listed, shown
from fastuper.models.parsing_configuration import UnifiedPerceptualParsingConfig
from fastuper_kernels import upsample_cross_entropy
from fastuper_kernels.dispatch.modes import is_autocast, is_eager

UNLABELLED = -1
"""The label of images without a scene or texture, and of pixels that the loss of parts leaves out."""


def check_parsing_labels(
    labels: Mapping[str, torch.Tensor], tasks: Sequence[str], config: UnifiedPerceptualParsingConfig, batch: int
) -> dict[str, torch.Tensor]:
    """Return the targets of the losses, int64: the labels, but for parts each pixel's position in its object's parts.

    Values are checked on a CPU only: on a GPU the host would wait for each step. There a part that does not belong to
    its object counts as "other", as in the official code.

    Args:
        labels: {task: labels}, as `UperNetForUnifiedPerceptualParsing.forward` takes them.
        tasks: the tasks that run.
        config: the model's configuration.
        batch: the number of images.

    Raises:
        TypeError: the labels are no mapping, or a task's are no tensor.
        ValueError: a task is unknown or does not run; labels have a wrong shape, dtype or value; parts come without
            objects; a part is not one of its object's. The message names the task and the value.
    """
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels must map tasks to tensors, got {type(labels).__name__}")
    if not labels:
        raise ValueError(f"labels are empty: give those of one task at least, of {', '.join(tasks)}")
    readable = {*tasks, *(("object",) if "part" in tasks else ())}
    targets = {}
    for task, given in labels.items():
        if task not in readable:
            raise ValueError(f"labels has {shown(task)}, which is none of the tasks that run: {', '.join(tasks)}")
        targets[task] = _check_task(task, given, batch, len(config.labels[task]))
    if "part" in targets:
        if "object" not in targets:
            raise ValueError("labels has parts without objects: a part belongs to an object, so give 'object' too")
        if targets["part"].shape != targets["object"].shape:
            shapes = [tuple(targets[task].shape) for task in ("part", "object")]
            raise ValueError("labels of parts and of objects must have one size, got {} and {}".format(*shapes))
        targets["part"] = _positions(targets["object"], targets["part"], config)
    return targets


def _check_task(task: str, labels: Any, batch: int, classes: int) -> torch.Tensor:
    """Return the labels of a task as int64."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels of {task} must be a tensor, got {type(labels).__name__}")
    maps, images = f"({batch}, height, width)", f"({batch},)"
    wanted = {"scene": images, "texture": f"{images} or {maps}"}.get(task, maps)
    dims = {"scene": (1,), "texture": (1, 3)}.get(task, (3,))
    if labels.ndim not in dims or labels.shape[0] != batch or 0 in labels.shape:
        raise ValueError(f"labels of {task} must be {wanted}, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels of {task} must be integers, got {labels.dtype}")
    labels = labels.long()
    if labels.device.type == "cpu" and is_eager():
        least = 0 if task in WITH_BACKGROUND else UNLABELLED
        low, high = labels.aminmax()
        if low < least or high >= classes:
            found = labels[(labels < least) | (labels >= classes)].unique().tolist()
            raise ValueError(
                f"labels of {task} must be from 0 to {classes - 1}, or {least} for no label; found {listed(found, 5)}"
            )
    return labels


def _positions(objects: torch.Tensor, parts: torch.Tensor, config: UnifiedPerceptualParsingConfig) -> torch.Tensor:
    """Return the position (B, H, W) of each pixel's part in the parts of its object, from 1; 0 for other parts."""
    places = [
        (number, part, place) for number, own in config.object_parts.items() for place, part in enumerate(own, start=1)
    ]
    numbers, ids, in_order = torch.tensor(places, device=parts.device).unbind(dim=1)
    table = objects.new_full((len(config.labels["object"]), len(config.labels["part"])), UNLABELLED)
    table[numbers, ids] = in_order
    table[:, 0] = 0
    table[0] = 0  # the parts of a pixel without an object are not read
    positions = table[objects, parts]
    if parts.device.type == "cpu" and is_eager() and (foreign := positions < 0).any():
        number, part = int(objects[foreign][0]), int(parts[foreign][0])
        raise ValueError(
            f"labels of part has {part} ({shown(config.labels['part'][part])}) inside object {number} "
            f"({shown(config.labels['object'][number])}), which has no such part in object_parts"
        )
    return positions.clamp(min=0)


def parsing_losses(
    logits: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], config: UnifiedPerceptualParsingConfig
) -> dict[str, torch.Tensor]:
    """Return the loss of each task that has logits and targets, without its weight.

    Args:
        logits: {task: logits}, as the head returns them.
        targets: those of `check_parsing_labels`.
        config: the model's configuration.

    Returns:
        Scalars in the dtype of the logits, under autocast float32.
    """
    losses = {}
    for task, coarse in logits.items():
        if task not in targets:
            continue
        target = targets[task]
        if task in ("object", "material"):
            loss = upsample_cross_entropy(coarse, target, ignore_index=0)
        elif task == "texture":
            maps = target if target.ndim == 3 else target[:, None, None].expand(-1, *coarse.shape[2:])
            loss = upsample_cross_entropy(coarse, maps, ignore_index=UNLABELLED)
        else:  # a sum, which can exceed the largest number of float16
            wide = coarse.to(torch.promote_types(coarse.dtype, torch.float32))
            if task == "scene":
                total = F.cross_entropy(wide, target, ignore_index=UNLABELLED, reduction="sum")
                loss = total / (target != UNLABELLED).sum().clamp(min=1)
            else:
                loss = part_loss(wide, targets["object"], target, config.part_slices)
        losses[task] = loss if is_autocast(coarse.device.type) else loss.to(coarse.dtype)
    return losses


def part_loss(
    logits: torch.Tensor, objects: torch.Tensor, positions: torch.Tensor, slices: Mapping[int, slice]
) -> torch.Tensor:
    """Return the sum over objects of the mean cross entropy of their parts, over the pixels of the labelled object.

    Pixels of an object count in the images where one of its parts occurs in it; "other" is then a class too.

    Args:
        logits: (B, channels, h, w), resampled (bilinear) to the size of the labels.
        objects: (B, H, W) int64, the labelled objects.
        positions: (B, H, W) int64, the position of each pixel's part in the parts of its object, from 1; 0 for other.
        slices: the channels of each object, in order and without gaps.

    Returns:
        A scalar; 0 if no part occurs.
    """
    # One split, whose gradient is written once: the gradient of each single slice would fill all channels.
    parts = dict(zip(slices, logits.split([own.stop - own.start for own in slices.values()], dim=1), strict=True))
    total = logits[:, :0].sum()
    if not is_eager():
        for number, coarse in parts.items():
            inside = objects == number
            inside = inside & (inside & (positions > 0)).any(dim=2).any(dim=1)[:, None, None]
            total = total + _sum_over(coarse, positions, inside) / inside.sum().clamp(min=1)
        return total

    # Only objects that occur, and of the batch only the images where one of their parts occurs.
    batch, many = len(objects), max(slices) + 1
    place = torch.arange(batch, device=objects.device)[:, None, None] * many + objects
    occurs = torch.bincount(place[positions > 0], minlength=batch * many).view(batch, many).T.tolist()
    for number, coarse in parts.items():
        if any(occurs[number]):
            images = [image for image in range(batch) if occurs[number][image]]
            if len(images) < batch:
                coarse, own, own_positions = coarse[images], objects[images], positions[images]
            else:
                own, own_positions = objects, positions
            inside = own == number
            total = total + _sum_over(coarse, own_positions, inside) / inside.sum()
    return total


def _sum_over(logits: torch.Tensor, positions: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross entropies over the pixels of a mask (B, H, W)."""
    labels = positions.where(inside, UNLABELLED)
    return upsample_cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
