"""The proof of an export: the exported model, in its runtime, beside the eager model, at eight sizes.

The reference is the model in float64; in float32 for images of more than `WIDE` pixels. It takes one image at a time,
so that the exported model's batches are compared with single images.

Labels are compared where the reference decides them: its two best logits differ by more than an export may move both.
In float32 that is the largest error of the eager model in the image. Exports err as much to twice as much, in a few
pixels, which would have to be near ties too; no right export was seen to be refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fastuper.export.formats import Arrays, Runner
from fastuper.export.graph import Graph
from fastuper.export.settings import ExportError, ProofError
from fastuper.export.sizes import Case, arrays_of, checked_cases, output_of
from fastuper.io.messages import format_size, one_line
from fastuper.models.backbones.foreign.measuring import FAULTS
from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing
from fastuper_kernels.ops.upsample_cross_entropy import as_two_classes

BOUNDS = {"float32": 2e-5, "float16": 2e-2, "bfloat16": 6e-2}
"""The largest error of logits by the dtype of the export: the norm of the difference, relative to the norm."""

PREPROCESSED = 2e-3
"""The same, at least, where photos are prepared inside, and a runtime may round a resized pixel to the next level."""

WIDE = 2**18
"""The largest image whose reference is computed in float64, in pixels."""

EXACT = 4 * torch.finfo(torch.float32).eps
"""What float32 moves a logit by at least, relative to the largest."""


def bound_of(graph: Graph) -> float:
    """Return the largest error of logits, relative."""
    # OpenVINO divides by multiplying with a reciprocal.
    is_exact = graph.preprocessing is None or (graph.preprocessing.is_exact and graph.settings.format != "openvino")
    return max(BOUNDS[graph.settings.dtype], 0 if is_exact else PREPROCESSED)


class Reference:
    """The eager model that an export is compared with.

    Args:
        model: the model in float32, in evaluation mode, on the CPU.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.wide: nn.Module | None = copy.deepcopy(model).double()

    def logits(self, pixels: torch.Tensor, bound: float) -> tuple[dict[str, torch.Tensor], dict[str, float], str]:
        """Return the reference's results for an image.

        Args:
            pixels: the image, (1, C, H, W), float32.
            bound: the largest error of an export's logits, relative.

        Returns:
            The logits by task ("logits" for UPerNet); by how much the logits of a right export differ at most; and the
            logits' dtype in words. In float32 logits differ by no more than the eager model's.

        Raises:
            ExportError: they are not finite, or the model refuses the image.
        """
        logits, dtype = None, "float64"
        if self.wide is not None and pixels.shape[2] * pixels.shape[3] <= WIDE:
            try:
                logits = _logits(self.wide, pixels.double())
            except FAULTS:  # a module of the user's own that is for float32
                self.wide = None
        if logits is None:
            try:
                logits, dtype = _logits(self.model, pixels), "float32"
            except FAULTS as error:
                size = format_size(pixels.shape[2:])
                raise ExportError(
                    f"the model takes no images of {size} pixels ({one_line(error)}); give the size that it takes, "
                    "size=HEIGHTxWIDTH"
                ) from None
        if not all(bool(x.isfinite().all()) for x in logits.values()):
            raise ExportError("the model's own logits are not finite: its weights are not, or they overflow")
        moved = {task: bound * float(x.abs().amax()) for task, x in logits.items()}
        if dtype == "float64" and bound == BOUNDS["float32"]:
            for task, x in _logits(self.model, pixels).items():
                own, least = (x - logits[task]).abs().amax(), EXACT * logits[task].abs().amax()
                moved[task] = min(moved[task], float(torch.maximum(own, least)))
        return logits, moved, dtype


def prove(run: Runner, graph: Graph, model: nn.Module) -> list[dict[str, Any]]:
    """Run an exported model at eight sizes, and compare it with the eager model.

    Args:
        run: the exported model.
        graph: what was exported.
        model: the eager model, float32.

    Returns:
        For each size its batch, height, width, the reference's dtype, and what was found: `error`, of the logits or
        probabilities; `labels_different`, the number of labels that differ where the reference decides; and
        `labels_undecided`, the share of pixels where it does not.

    Raises:
        ProofError: the exported model does not run at a size, or its results are others.
    """
    reference = Reference(model)
    checked = []
    for case in checked_cases(graph):
        arrays = arrays_of(case, graph)
        try:
            found = run(arrays)
        except Exception as error:  # its class depends on the runtime
            raise ProofError(_wrong(graph, case, f"does not run: {type(error).__name__}: {one_line(error)}")) from None
        checked.append(_compared(found, arrays, case, graph, reference))
    return checked


@torch.inference_mode()
def _compared(found: Arrays, arrays: Arrays, case: Case, graph: Graph, reference: Reference) -> dict[str, Any]:
    """Return the entry of a size in export.json.

    Raises:
        ProofError: the results are not the model's.
    """
    for name in graph.output_names:
        if name not in found:
            raise ProofError(_wrong(graph, case, f"has no output {name}"))
        if (dtype := output_of(name, graph)["dtype"]) != found[name].dtype:
            raise ProofError(_wrong(graph, case, f"gives {name} in {found[name].dtype} in place of {dtype}"))
    bound = bound_of(graph)
    images = _pixels(arrays, case, graph)
    differences, norms = [0.0], [0.0]
    different = undecided = pixels = 0
    dtype = ""
    for i in range(case.batch):
        logits, moved, dtype = reference.logits(images[i : i + 1], bound)
        expected = _expected(logits, moved, case, graph)
        for name, (values, labels, decided) in expected.items():
            own = torch.from_numpy(found[name][i : i + 1].copy())
            is_map = graph.settings.labels and labels is not None
            wanted = labels if is_map else values
            assert wanted is not None
            if len(found[name]) != case.batch or own.shape != wanted.shape:
                shape = (case.batch, *wanted.shape[1:])
                raise ProofError(_wrong(graph, case, f"gives {name} {tuple(found[name].shape)} in place of {shape}"))
            if not is_map:
                assert values is not None
                differences.append(_norm(own - values))
                norms.append(_norm(values))
                own = own if labels is None else _argmax(own)
            if labels is not None and decided is not None:
                different += int(((own.long() != labels) & decided).sum())
                undecided += int((~decided).sum())
                pixels += labels.numel()
    entry: dict[str, Any] = {"batch": case.batch, "height": case.height, "width": case.width, "reference": dtype}
    if case.target_size is not None:
        entry["target_size"] = list(case.target_size)
    if len(norms) > 1:
        entry["error"] = float(np.linalg.norm(differences) / np.linalg.norm(norms))
        if not entry["error"] <= bound:  # NaN is not, either
            fault = f"differs from the model by {entry['error']:.1e} (relative), at most {bound:.0e} is allowed"
            raise ProofError(_wrong(graph, case, fault))
    if pixels:
        entry["labels_different"], entry["labels_undecided"] = different, undecided / pixels
        if different:
            raise ProofError(_wrong(graph, case, f"gives {different} of {pixels} pixels another label"))
    return entry


Expected = dict[str, tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]
"""By an output's name: its values; the labels that follow; and where the reference decides them. None: has none."""


def _expected(logits: Mapping[str, torch.Tensor], moved: Mapping[str, float], case: Case, graph: Graph) -> Expected:
    """Return what an export gives for an image, from the results of `Reference.logits`."""
    size = case.target_size or (case.height, case.width)
    labels = graph.settings.labels
    if not isinstance(graph.model, UperNetForUnifiedPerceptualParsing):
        full = logits["logits"]
        if labels and tuple(full.shape[2:]) != size:
            full = F.interpolate(full, size, mode="bilinear", align_corners=False)
        return {graph.output_names[0]: (logits["logits"], _argmax(full), _decided(full, moved["logits"]))}
    expected: Expected = {}
    for task, x in logits.items():
        if x.ndim == 2:
            expected[task] = (x.softmax(1) if labels else x, None, None)
        elif not labels:
            expected[task] = (x, None, None)
        elif task != "part":
            full = F.interpolate(x, size, mode="bilinear", align_corners=False)
            expected[task] = (None, full.argmax(1), _decided(full, moved[task]))
        else:
            full = F.interpolate(x, size, mode="bilinear", align_corners=False)
            expected[task] = (None, *_parts(full, expected["object"], graph.model.config, moved[task]))
    return expected


def _norm(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    return as_two_classes(logits).argmax(1)


def _decided(logits: torch.Tensor, moved: float) -> torch.Tensor:
    """Return where the two best logits (1, classes, H, W) differ by more than `moved`, for both."""
    two = as_two_classes(logits)
    best = two.topk(min(2, two.shape[1]), dim=1).values
    return best[:, 0] - best[:, -1] > 2 * moved


def _parts(logits: torch.Tensor, objects: Any, config: Any, moved: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the parts of each pixel, by the parts of the object there, and where the reference decides them."""
    _, names, decided = objects
    labels, decided = torch.zeros_like(names), decided.clone()
    for number, parts in config.object_parts.items():
        here = names == number
        if number in config.part_slices and bool(here.any()):
            own = logits[:, config.part_slices[number]]
            ids = torch.tensor([0, *parts])
            labels[here] = ids[own.argmax(1)][here]
            decided[here] &= _decided(own, moved)[here]
    return labels, decided


def _pixels(arrays: Arrays, case: Case, graph: Graph) -> torch.Tensor:
    """Return the images as the model reads them, (B, C, H, W) float32.

    Raises:
        ProofError: the graph's preprocessing differs from the image processor's by more than one 8-bit level.
    """
    if graph.preprocessing is None:
        return torch.from_numpy(arrays["pixel_values"])
    processor = graph.processor
    pixels = graph.preprocessing(torch.from_numpy(arrays["images"]))
    expected = processor(images=list(arrays["images"]), return_tensors="pt", data_format="channels_first")[
        "pixel_values"
    ]
    level = processor.rescale_factor if processor.do_rescale else 1.0
    if processor.do_normalize:
        level = level / torch.as_tensor(processor.image_std, dtype=torch.float32).view(-1, 1, 1)
    if pixels.shape != expected.shape or not bool(((pixels - expected).abs() <= 1.001 * level).all()):
        raise ProofError(_wrong(graph, case, "prepares photos in another way than the image processor"))
    return pixels


def _logits(model: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    output = model(pixels, return_dict=True)
    if isinstance(model, UperNetForUnifiedPerceptualParsing):
        return {task: output[task] for task in model.config.tasks}
    return {"logits": output.logits}


def _wrong(graph: Graph, case: Case, fault: str) -> str:
    remedy = "give size=HEIGHTxWIDTH, or" if graph.settings.image_size is None else "give"
    return (
        f"format={graph.settings.format}: at {case} the exported model {fault}; nothing was written; {remedy} another "
        "format"
    )
