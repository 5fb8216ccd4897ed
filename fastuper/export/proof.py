"""The proof of an export: the exported model, in its runtime, beside the eager model, at eight sizes.

The reference is the model in float64; in float32 for images of more than `WIDE` pixels. It takes one image at a time,
so that the exported model's batches are compared with single images.
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
from fastuper.export.sizes import Case, arrays_of, checked_cases
from fastuper.io.messages import one_line
from fastuper.models.backbones.foreign.measuring import FAULTS
from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing
from fastuper_kernels.ops.upsample_cross_entropy import as_two_classes

BOUNDS = {"float32": 2e-5, "float16": 2e-2, "bfloat16": 6e-2}
"""The largest error of logits by the dtype of the export: the norm of the difference, relative to the norm."""

WIDE = 2**16
"""The largest image whose reference is computed in float64, in pixels."""


class Reference:
    """The eager model that an export is compared with.

    Args:
        model: the model in float32, in evaluation mode, on the CPU.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.wide: nn.Module | None = copy.deepcopy(model).double()

    def logits(self, pixels: torch.Tensor) -> tuple[dict[str, torch.Tensor], str]:
        """Return the logits of an image (1, C, H, W), float64, by task ("logits" for UPerNet), and the dtype they had.

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
            logits, dtype = _logits(self.model, pixels), "float32"
        if not all(bool(x.isfinite().all()) for x in logits.values()):
            raise ExportError("the model's own logits are not finite: its weights are not, or they overflow")
        return {task: x.double() for task, x in logits.items()}, dtype


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
    missing = [name for name in graph.output_names if name not in found]
    if missing:
        raise ProofError(_wrong(graph, case, f"has no output {', '.join(missing)}"))
    bound = BOUNDS[graph.settings.dtype]
    images = _pixels(arrays, graph)
    differences, norms = [0.0], [0.0]
    different = undecided = pixels = 0
    dtype = ""
    for i in range(case.batch):
        logits, dtype = reference.logits(images[i : i + 1])
        expected = _expected(logits, case, graph, bound)
        for name, (values, labels, decided) in expected.items():
            own = torch.from_numpy(np.asarray(found[name])[i : i + 1])
            is_map = graph.settings.labels and labels is not None
            wanted = labels if is_map else values
            assert wanted is not None
            if len(found[name]) != case.batch or own.shape != wanted.shape:
                shape = (case.batch, *wanted.shape[1:])
                raise ProofError(_wrong(graph, case, f"gives {name} {tuple(found[name].shape)} in place of {shape}"))
            if not is_map:
                assert values is not None
                differences.append(float((own.double() - values).norm()))
                norms.append(float(values.norm()))
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


def _expected(logits: Mapping[str, torch.Tensor], case: Case, graph: Graph, bound: float) -> Expected:
    """Return what an export gives for an image, from the logits of the reference."""
    size = case.target_size or (case.height, case.width)
    labels = graph.settings.labels
    if not isinstance(graph.model, UperNetForUnifiedPerceptualParsing):
        full = logits["logits"]
        if case.target_size is not None:
            full = F.interpolate(full, size, mode="bilinear", align_corners=False)
        return {graph.output_names[0]: (logits["logits"], _argmax(full), _decided(full, bound))}
    expected: Expected = {}
    for task, x in logits.items():
        if x.ndim == 2:
            expected[task] = (x.softmax(1) if labels else x, None, None)
        elif not labels:
            expected[task] = (x, None, None)
        elif task != "part":
            full = F.interpolate(x, size, mode="bilinear", align_corners=False)
            expected[task] = (None, full.argmax(1), _decided(full, bound))
        else:
            full = F.interpolate(x, size, mode="bilinear", align_corners=False)
            expected[task] = (None, *_parts(full, expected["object"], graph.model.config, bound))
    return expected


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    return as_two_classes(logits).argmax(1)


def _decided(logits: torch.Tensor, bound: float) -> torch.Tensor:
    """Return where the two best logits (1, classes, H, W) differ by more than the bound moves both.

    The bound is relative to the largest logit.
    """
    two = as_two_classes(logits)
    best = two.topk(min(2, two.shape[1]), dim=1).values
    return best[:, 0] - best[:, -1] > 2 * bound * two.abs().amax()


def _parts(logits: torch.Tensor, objects: Any, config: Any, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the parts of each pixel, by the parts of the object there, and where the reference decides them."""
    _, names, decided = objects
    labels, decided = torch.zeros_like(names), decided.clone()
    for number, parts in config.object_parts.items():
        here = names == number
        if number in config.part_slices and bool(here.any()):
            own = logits[:, config.part_slices[number]]
            ids = torch.tensor([0, *parts])
            labels[here] = ids[own.argmax(1)][here]
            decided[here] &= _decided(own, bound)[here]
    return labels, decided


def _pixels(arrays: Arrays, graph: Graph) -> torch.Tensor:
    """Return the images as the model reads them, (B, C, H, W) float32."""
    if not graph.settings.with_preprocessing:
        return torch.from_numpy(arrays["pixel_values"])
    return graph.preprocess(torch.from_numpy(arrays["images"]))


def _logits(model: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    output = model(pixels, return_dict=True)
    if isinstance(model, UperNetForUnifiedPerceptualParsing):
        return {task: output[task] for task in model.config.tasks}
    return {"logits": output.logits}


def _wrong(graph: Graph, case: Case, fault: str) -> str:
    remedy = "give size=HEIGHTxWIDTH, or" if graph.settings.image_size is None else "give"
    return f"format={graph.settings.format}: at {case} the exported model {fault}; nothing was written; {remedy} another format"
