"""Unified Perceptual Parsing stated again, in ordinary PyTorch calls: what the official code computes, and how.

Written from a description of the official code (CSAILVision/unifiedparsing) and of Precise RoI pooling's kernel
(vacancy/PreciseRoIPooling), not from this package's modules. It has the official code's order of operations, full-size
logits and probabilities, and names of tensors (`encoder_*.pth`, `decoder_*.pth`). The texture head, which the official
code does not have, is stated by this package's names. Functions work in any float dtype; tests take float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

SCALES = (1, 2, 3, 6)
BLUE_GREEN_RED_MEANS = (102.9801, 115.9465, 122.7717)
LOSS_WEIGHTS = {"scene": 0.25, "object": 1.0, "part": 0.5, "material": 1.0}

State = dict[str, Tensor]
ObjectParts = Mapping[int, Sequence[int]]


# Random checkpoints.


def random_weight(generator: torch.Generator, *shape: int, gain: float = 2.0, dtype: torch.dtype) -> Tensor:
    """Return normal numbers of variance gain / fan-in."""
    return torch.randn(shape, generator=generator, dtype=dtype) * (gain / math.prod(shape[1:])) ** 0.5


def random_norm(generator: torch.Generator, name: str, size: int, *, dtype: torch.dtype) -> State:
    """Return BatchNorm's tensors, far from those of a new BatchNorm."""
    ranges = {"weight": (0.5, 1.5), "bias": (-0.3, 0.5), "running_mean": (-0.5, 0.5), "running_var": (0.4, 2.0)}
    return {
        f"{name}.{field}": low + (high - low) * torch.rand(size, generator=generator, dtype=dtype)
        for field, (low, high) in ranges.items()
    }


def official_state(
    generator: torch.Generator,
    *,
    hidden_size: int = 16,
    pool_channels: int = 16,
    channels: Sequence[int] = (16, 24, 32, 40),
    classes: Mapping[str, int],
    blocks: Sequence[int] = (1, 1, 1, 1),
    stem_widths: Sequence[int] = (4, 6, 8),
    temporary: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[State, State]:
    """Return random state dicts of the official encoder and decoder, of any width.

    Args:
        generator: the source of the numbers.
        hidden_size: D, the width of the decoder.
        pool_channels: the width of the branches of pyramid pooling.
        channels: the channels of C2 to C5, multiples of 4.
        classes: the channels of the classifiers of scene, object, part and material; a task that is not in it has no
            head.
        blocks: the bottlenecks of each stage.
        stem_widths: the channels of the three convolutions of the stem.
        temporary: add the buffers of the official synchronised BatchNorm, and the count of batches.
        dtype: the dtype of all tensors but the counts.
    """

    def conv(name: str, norm: str, outputs: int, inputs: int, kernel: int) -> State:
        state = {f"{name}.weight": random_weight(generator, outputs, inputs, kernel, kernel, dtype=dtype)}
        state |= random_norm(generator, norm, outputs, dtype=dtype)
        if temporary:
            state[f"{norm}.num_batches_tracked"] = torch.tensor(200_000)
            state[f"{norm}._tmp_running_mean"] = 999 * state[f"{norm}.running_mean"]
            state[f"{norm}._tmp_running_var"] = 999 * state[f"{norm}.running_var"]
            state[f"{norm}._running_iter"] = torch.full((1,), 999.0, dtype=dtype)
        return state

    encoder: State = {}
    for number, (inputs, outputs) in enumerate(pairwise((3, *stem_widths)), 1):
        encoder |= conv(f"conv{number}", f"bn{number}", outputs, inputs, 3)
    inputs = stem_widths[-1]
    for number, (outputs, depth) in enumerate(zip(channels, blocks, strict=True), 1):
        planes = outputs // 4
        for block in range(depth):
            name = f"layer{number}.{block}"
            encoder |= conv(f"{name}.conv1", f"{name}.bn1", planes, inputs, 1)
            encoder |= conv(f"{name}.conv2", f"{name}.bn2", planes, planes, 3)
            encoder |= conv(f"{name}.conv3", f"{name}.bn3", outputs, planes, 1)
            if block == 0 and (number > 1 or inputs != outputs):  # the stride, or the channels, change
                encoder |= conv(f"{name}.downsample.0", f"{name}.downsample.1", outputs, inputs, 1)
            inputs = outputs

    decoder: State = {}
    for number in range(len(SCALES)):
        decoder |= conv(f"ppm_conv.{number}.0", f"ppm_conv.{number}.1", pool_channels, channels[-1], 1)
    pooled = channels[-1] + len(SCALES) * pool_channels
    decoder |= conv("ppm_last_conv.0", "ppm_last_conv.1", hidden_size, pooled, 3)
    for number, inputs in enumerate(channels[:-1]):
        decoder |= conv(f"fpn_in.{number}.0", f"fpn_in.{number}.1", hidden_size, inputs, 1)
        decoder |= conv(f"fpn_out.{number}.0.0", f"fpn_out.{number}.0.1", hidden_size, hidden_size, 3)
    decoder |= conv("conv_fusion.0", "conv_fusion.1", hidden_size, len(channels) * hidden_size, 3)
    for task, count in classes.items():
        classifier = f"{task}_head.2" if task == "scene" else f"{task}_head.1"
        decoder |= conv(f"{task}_head.0.0", f"{task}_head.0.1", hidden_size, hidden_size, 3)
        decoder[f"{classifier}.weight"] = random_weight(generator, count, hidden_size, 1, 1, gain=4.0, dtype=dtype)
        decoder[f"{classifier}.bias"] = random_weight(generator, count, dtype=dtype)
    return encoder, decoder


def texture_state(
    generator: torch.Generator,
    *,
    channels: int,
    texture_channels: int,
    classes: int,
    dtype: torch.dtype = torch.float64,
) -> State:
    """Return random tensors of the texture head, by the names in the head: two convolutions and a classifier."""
    state: State = {}
    for number, inputs in enumerate((channels, texture_channels)):
        name = f"convs.{number}"
        state[f"{name}.conv.weight"] = random_weight(generator, texture_channels, inputs, 3, 3, dtype=dtype)
        state |= random_norm(generator, f"{name}.batch_norm", texture_channels, dtype=dtype)
    state["classifier.weight"] = random_weight(generator, classes, texture_channels, 1, 1, gain=4.0, dtype=dtype)
    state["classifier.bias"] = random_weight(generator, classes, dtype=dtype)
    return state


# The network.


def bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def tent_integral(t: Tensor) -> Tensor:
    """Return the integral of the tent max(0, 1 - |u|) from minus infinity to t."""
    rising, falling = (t + 1) ** 2 / 2, 0.5 + t - t**2 / 2
    inside = torch.where(t < 0, rising, falling)
    return torch.where(t <= -1, torch.zeros_like(t), torch.where(t >= 1, torch.ones_like(t), inside))


def precise_roi(x: Tensor, s: int) -> Tensor:
    """Pool (B, C, h, w) to (B, C, s, s): the mean of the bilinear surface over each bin of [0, h] x [0, w].

    Cell (i, j) lies at the coordinates (i, j); the surface falls to zero one cell away from the outermost cells.
    """

    def weights(cells: int) -> Tensor:
        length = cells / s
        rows = torch.empty((s, cells), dtype=torch.float64)
        for k in range(s):
            for i in range(cells):
                ends = torch.tensor([k * length - i, (k + 1) * length - i], dtype=torch.float64)
                low, high = tent_integral(ends)
                rows[k, i] = (high - low) / length
        return rows.to(x)

    return torch.einsum("kh,bchw,lw->bckl", weights(x.shape[2]), x, weights(x.shape[3]))


def reference_encoder(state: State, pixel_values: Tensor, *, training: bool = False) -> list[Tensor]:
    """Return C2 to C5 of the official ResNet: a stem of three convolutions, then bottlenecks, without dilation."""

    def conv(x: Tensor, name: str, norm_name: str, stride: int = 1) -> Tensor:
        return conv_norm(state, x, name, norm_name, training=training, stride=stride)

    x = conv(pixel_values, "conv1", "bn1", 2).relu()
    x = conv(x, "conv2", "bn2").relu()
    x = conv(x, "conv3", "bn3").relu()
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    maps = []
    for stage in (1, 2, 3, 4):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in state:
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = conv(x, f"{name}.conv1", f"{name}.bn1").relu()
            y = conv(y, f"{name}.conv2", f"{name}.bn2", stride).relu()
            y = conv(y, f"{name}.conv3", f"{name}.bn3")
            if f"{name}.downsample.0.weight" in state:
                x = conv(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = (y + x).relu()
            block += 1
        maps.append(x)
    return maps


def conv_norm(state: State, x: Tensor, name: str, norm_name: str, *, training: bool, stride: int = 1) -> Tensor:
    """Return the convolution without bias, padded by half its kernel, and its BatchNorm, without ReLU."""
    weight = state[f"{name}.weight"]
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    mean, variance = (state[f"{norm_name}.{field}"].clone() for field in ("running_mean", "running_var"))
    scale, shift = state[f"{norm_name}.weight"], state[f"{norm_name}.bias"]
    return F.batch_norm(x, mean, variance, scale, shift, training=training, momentum=0.001, eps=1e-5)


def reference_decoder(
    state: State,
    feature_maps: Sequence[Tensor],
    *,
    pooling: str = "precise_roi",
    resample_first: bool = True,
    texture: State | None = None,
    training: bool = False,
) -> dict[str, Tensor]:
    """Return the logits of every head that the state dict has, at the size of the map that the head reads.

    Args:
        state: the official decoder's.
        feature_maps: C2 to C5.
        pooling: "precise_roi" (official) or "adaptive" (`AdaptiveAvgPool2d`).
        resample_first: a pooled map is resampled before its convolution (official), or after its ReLU.
        texture: the texture head's tensors; None: no texture.
        training: BatchNorm by the statistics of the batch.
    """

    def conv_relu(x: Tensor, name: str) -> Tensor:
        return conv_norm(state, x, f"{name}.0", f"{name}.1", training=training).relu()

    def classifier(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])

    c5 = feature_maps[-1]
    branches = [c5]
    for number, scale in enumerate(SCALES):
        cells = precise_roi(c5, scale) if pooling == "precise_roi" else F.adaptive_avg_pool2d(c5, scale)
        if resample_first:
            branches.append(conv_relu(bilinear(cells, c5.shape[2:]), f"ppm_conv.{number}"))
        else:
            branches.append(bilinear(conv_relu(cells, f"ppm_conv.{number}"), c5.shape[2:]))
    p5 = conv_relu(torch.cat(branches, dim=1), "ppm_last_conv")

    f, pyramid = p5, [p5]
    for number in (2, 1, 0):
        lateral = conv_relu(feature_maps[number], f"fpn_in.{number}")
        f = lateral + bilinear(f, lateral.shape[2:])
        pyramid.insert(0, conv_relu(f, f"fpn_out.{number}.0"))
    p2 = pyramid[0]
    fused = conv_relu(torch.cat([p2, *(bilinear(p, p2.shape[2:]) for p in pyramid[1:])], dim=1), "conv_fusion")

    logits = {}
    if "scene_head.2.weight" in state:
        x = F.adaptive_avg_pool2d(conv_relu(p5, "scene_head.0"), 1)
        logits["scene"] = classifier(x, "scene_head.2").flatten(1)
    for task, source in (("object", fused), ("part", fused), ("material", p2)):
        if f"{task}_head.1.weight" in state:
            logits[task] = classifier(conv_relu(source, f"{task}_head.0"), f"{task}_head.1")
    if texture is not None:
        x = feature_maps[0].detach()
        for number in (0, 1):
            name = f"convs.{number}"
            x = conv_norm(texture, x, f"{name}.conv", f"{name}.batch_norm", training=training).relu()
        logits["texture"] = F.conv2d(x, texture["classifier.weight"], texture["classifier.bias"])
    return logits


def slices(object_parts: ObjectParts) -> dict[int, slice]:
    """Return each object's channels in the part head: "other", then its parts; the objects ascend."""
    result, first = {}, 0
    for number in sorted(object_parts):
        result[number] = slice(first, first + 1 + len(object_parts[number]))
        first = result[number].stop
    return result


# The loss.


def part_positions(objects: NDArray[Any], parts: NDArray[Any], number: int, listed: Sequence[int]) -> NDArray[Any]:
    """Return a map of positions in an object's list of parts: 0 outside the object, and for any other part."""
    positions = np.zeros(objects.shape, dtype=np.int64)
    for position, part in enumerate(listed, 1):
        positions[(objects == number) & (parts == part)] = position
    return positions


def reference_loss(
    logits: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    object_parts: ObjectParts,
    weights: Mapping[str, float] = LOSS_WEIGHTS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the terms, and the terms. A mean over no pixel, or no image, is 0.

    Args:
        logits: as `reference_decoder` returns them; they are resampled to the size of the labels.
        labels: the terms that count. "object" (B, H, W), 0 is not labelled. "part" (B, H, W), numbers of parts, read
            inside the objects. "material" (B, H, W), 0 is not labelled. "scene" (B,), -1 is not labelled. "texture"
            (B,) or (B, H, W), -1 is not labelled.
        object_parts: the parts of each object.
        weights: the factor of each term.
    """

    def mean_nll(log_probabilities: Tensor, targets: Tensor, ignored: int) -> Tensor:
        kept = targets != ignored
        if not kept.any():
            return log_probabilities.sum() * 0
        classes = log_probabilities.movedim(1, -1)[kept]
        return -classes[torch.arange(len(classes)), targets[kept]].mean()

    terms: dict[str, Tensor] = {}
    for task, targets in labels.items():
        if task == "scene":
            terms[task] = mean_nll(logits[task].log_softmax(1), targets, -1)
            continue
        if task == "texture" and targets.ndim == 1:
            targets = targets[:, None, None].expand(-1, *logits[task].shape[2:])
        x = bilinear(logits[task], targets.shape[1:])
        if task != "part":
            terms[task] = mean_nll(x.log_softmax(1), targets, -1 if task == "texture" else 0)
            continue
        total = x.sum() * 0
        for number, channels in slices(object_parts).items():
            log_probabilities = x[:, channels].log_softmax(1)
            term, pixels = x.sum() * 0, 0
            for image, (objects, parts) in enumerate(zip(labels["object"], targets, strict=True)):
                positions = torch.from_numpy(
                    part_positions(objects.numpy(), parts.numpy(), number, object_parts[number])
                )
                inside = objects == number
                if not positions.any():
                    continue  # the object is not annotated with parts in this image
                nll = -log_probabilities[image].gather(0, positions[None])[0]
                term, pixels = term + nll[inside].sum(), pixels + int(inside.sum())
            total = total + term / max(1, pixels)
        terms[task] = total
    return sum((weights[task] * term for task, term in terms.items()), torch.zeros(())), terms


# Label maps.


def reference_labels(
    logits: Sequence[Mapping[str, Tensor]],
    sizes: Sequence[tuple[int, int]],
    object_parts: ObjectParts,
    *,
    mask_background: bool = False,
) -> list[dict[str, Any]]:
    """Return scene probabilities and label maps of each image, from full-size logits and probabilities.

    Args:
        logits: the logits at each scale; the probabilities are averaged over the scales.
        sizes: the size of each image's label maps.
        object_parts: the parts of each object.
        mask_background: class 0 of objects and materials cannot win.
    """

    def mean(scales: Sequence[Tensor]) -> Tensor:
        return torch.stack([scale.softmax(0) for scale in scales]).mean(0)

    results = []
    for image, size in enumerate(sizes):
        full = {
            task: [bilinear(scale[task][image : image + 1], size)[0] for scale in logits]
            for task in logits[0]
            if task != "scene"
        }
        result: dict[str, Any] = {}
        if "scene" in logits[0]:
            result["scene"] = mean([scale["scene"][image] for scale in logits])
        for task in ("object", "material", "texture"):
            if task in full:
                first = int(mask_background and task != "texture")
                result[task] = mean(full[task])[first:].argmax(0) + first
        if "part" in full:
            result["part"] = torch.zeros(size, dtype=torch.int64)
            for number, channels in slices(object_parts).items():
                positions = mean([scale[channels] for scale in full["part"]]).argmax(0)
                parts = torch.tensor([0, *object_parts[number]])[positions]
                inside = result["object"] == number
                result["part"][inside] = parts[inside]
        results.append(result)
    return results


# The metrics.


def reference_metrics(
    samples: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    classes: Mapping[str, int],
    object_parts: ObjectParts,
) -> dict[str, float]:
    """Return the measures of the official evaluation, from (predictions, truth) of each image.

    Args:
        samples: mappings of task to a label map (H, W); scene: the number of the scene. The truth may lack tasks.
            Parts are numbers of parts. A true scene of -1 is not labelled.
        classes: the number of classes of object and material, with class 0.
        object_parts: the parts of each object.
    """
    measures: dict[str, float] = {}
    for task in ("object", "material"):
        intersection, union = np.zeros(classes[task]), np.zeros(classes[task])
        right = pixels = 0
        for predictions, truth in samples:
            if task not in truth:
                continue
            true = truth[task]
            predicted = np.where(true == 0, 0, predictions[task])
            for number in range(1, classes[task]):
                intersection[number] += ((predicted == number) & (true == number)).sum()
                union[number] += ((predicted == number) | (true == number)).sum()
            right += ((predicted == true) & (true > 0)).sum()
            pixels += (true > 0).sum()
        measures[f"{task} mIoU"] = float((intersection[1:] / (union[1:] + 1e-8)).mean())
        measures[f"{task} accuracy"] = float(right / pixels) if pixels else math.nan
    ious, accuracies = [], []
    for number, listed in object_parts.items():
        intersection, union = np.zeros(1 + len(listed)), np.zeros(1 + len(listed))
        right = pixels = 0
        for predictions, truth in samples:
            if "part" not in truth:
                continue
            true = part_positions(truth["object"], truth["part"], number, listed)
            predicted = part_positions(predictions["object"], predictions["part"], number, listed)
            if not true.any():
                continue  # the object is not annotated with parts in this image
            for position in range(1, 1 + len(listed)):
                intersection[position] += ((predicted == position) & (true == position)).sum()
                union[position] += ((predicted == position) | (true == position)).sum()
            right += ((predicted == true) & (true > 0)).sum()
            pixels += (true > 0).sum()
        if pixels:
            ious.append((intersection[1:] / (union[1:] + 1e-8)).mean())
            accuracies.append(right / pixels)
    measures["part mIoU"] = float(np.mean(ious)) if ious else math.nan
    measures["part accuracy"] = float(np.mean(accuracies)) if accuracies else math.nan
    scenes = [(p["scene"], t["scene"]) for p, t in samples if t.get("scene", -1) != -1]
    measures["scene top-1"] = float(np.mean([p == t for p, t in scenes])) if scenes else math.nan
    return measures


# The input.


def reference_input_size(h: int, w: int, short: int = 450, cap: int = 1000, multiple: int = 8) -> tuple[int, int]:
    """Return the height and width to which the official evaluation stretches a photo."""
    scale = min(short / min(h, w), cap / max(h, w))
    height, width = int(h * scale), int(w * scale)
    return ((height - 1) // multiple + 1) * multiple, ((width - 1) // multiple + 1) * multiple


def reference_input(
    image: NDArray[np.uint8], short: int = 450, cap: int = 1000, multiple: int = 8
) -> NDArray[np.float32]:
    """Return the network's input (3, height, width), float32, of an RGB image (H, W, 3), uint8.

    The image is stretched by OpenCV's bilinear filter, in 8 bits. Its channels become blue, green, red, from 0 to 255
    less their means.
    """
    import cv2

    height, width = reference_input_size(*image.shape[:2], short, cap, multiple)
    resized = cv2.resize(np.ascontiguousarray(image[:, :, ::-1]), (width, height), interpolation=cv2.INTER_LINEAR)
    values = resized.astype(np.float32) - np.array(BLUE_GREEN_RED_MEANS, dtype=np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))
