"""Quantisation to 8-bit integers after training: calibrated on photos, and judged on photos that it has not seen.

NNCF quantises OpenVINO's models, ONNX Runtime's own tools quantise ONNX's. Weights have a scale for each output
channel, activations a scale for each tensor, which follows from the values that occur on the photos.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastuper.data.folders import FolderDataset, find_splits, open_dataset
from fastuper.data.images import IMAGE_SUFFIXES, read_image
from fastuper.data.listing import list_images
from fastuper.data.pairs import described
from fastuper.data.samples import DataError
from fastuper.evaluation.confusion import ConfusionMatrix
from fastuper.evaluation.loop import check_classes
from fastuper.export.formats import Arrays, Runner, format_of
from fastuper.export.openvino import core
from fastuper.export.settings import ExportError, ExportSettings, ProofError
from fastuper.io.messages import format_size, name_of, reason

LEAST_PHOTOS = 10
"""The smallest number of photos: eight calibrate and two judge."""

MOST_PHOTOS = 250
"""The largest number of photos that are used; of a larger folder, evenly spaced by name."""

EVERY = 5
"""Every fifth photo by name judges; the others calibrate."""

LEAST_AGREEMENT = 0.97
"""The smallest share of equal labels of int8 and float."""

MOST_LOSS = 0.02
"""The largest loss of mean IoU."""


class Photos:
    """The photos of a folder as inputs of a graph, with their label maps if the folder has them.

    The folder holds photos, or photos and label maps in a layout of `fastuper.data.folders.open_dataset`; of a dataset
    with splits, the validation split is taken.

    Args:
        folder: the folder.
        settings: of the export: the graph's inputs and their size.
        processor: the model's image processor.
        id2label: the classes of the model's label maps; None for a model of several tasks, for which the folder's
            label maps are not read.

    Attributes:
        found: the number of photos in the folder.
        calibrating: the numbers of the photos that calibrate.
        judging: the numbers of the photos that judge.
        labelled: whether the folder has label maps that are read.

    Raises:
        ExportError: the folder has fewer than `LEAST_PHOTOS` photos, a file cannot be read, or the label maps do not
            fit the model's classes.
    """

    def __init__(
        self, folder: Path, settings: ExportSettings, processor: Any, id2label: Mapping[int, str] | None
    ) -> None:
        self.settings, self.processor = settings, processor
        self.dataset: FolderDataset | None = None
        try:
            has_layout = any(os.path.isdir(folder / name) for name in ("images", "leftImg8bit"))
            if has_layout and id2label is not None:
                self.dataset = _labelled(folder, id2label)
                self._files = [photo for photo, _ in self.dataset.files]
            else:
                self._files = _listed(folder / "images" if has_layout else folder)
            self.found = len(self._files)
            if self.found < LEAST_PHOTOS:
                raise DataError(f"{name_of(folder)} holds {self.found} photos; give {LEAST_PHOTOS} or more")
            spaced = np.linspace(0, self.found - 1, min(self.found, MOST_PHOTOS)).round().astype(int).tolist()
            self.judging = spaced[EVERY - 1 :: EVERY]
            self.calibrating = [number for number in spaced if number not in self.judging]
            for number in spaced:  # a fault is found now, not after the export
                self.read(number)
        except (ValueError, OSError) as error:
            raise ExportError(f"cannot quantise: {reason(error)}") from None

    def read(self, number: int) -> tuple[dict[str, np.ndarray], NDArray[np.integer] | None]:
        """Read a photo.

        Returns:
            The inputs of a graph by their names in `Graph`, a batch of one; and the label map (H, W) of the photo's
            size, None if the folder has none.
        """
        if self.dataset is None:
            photo: Any = read_image(self._files[number])
            label = None
        else:
            photo, label, _ = self.dataset[number]
        size = self.settings.image_size
        if self.settings.with_preprocessing:
            image = photo if size is None else photo.resize(size[::-1], Image.Resampling.BILINEAR)
            arrays = {"images": np.asarray(image)[None]}
            height_and_width = arrays["images"].shape[1:3]
        else:
            options = {} if size is None else {"do_resize": True, "size": {"height": size[0], "width": size[1]}}
            pixels = self.processor(images=photo, return_tensors="np", **options)["pixel_values"]
            arrays = {"pixel_values": np.ascontiguousarray(pixels, dtype=np.float32)}
            height_and_width = pixels.shape[2:]
        if self.settings.target_size:
            arrays["target_size"] = np.array(height_and_width, dtype=np.int64)
        return arrays, label


def quantize(
    settings: ExportSettings, folder: Path, photos: Photos, run_float: Runner, others: Iterable[Arrays] = ()
) -> dict[str, Any]:
    """Replace the float model in a folder by an int8 model that gives nearly the same label maps.

    Args:
        settings: of the export; the format is "onnx" or "openvino".
        folder: holds the files of the float model, and then those of the int8 model.
        photos: of `settings.int8`.
        run_float: the float model in its runtime.
        others: inputs of other sizes, at which the int8 model must run.

    Returns:
        What export.json says about int8: the number of photos that calibrated and judged, the share of equal labels,
        and if there are label maps the mean IoU of both.

    Raises:
        ProofError: int8 loses more than the limits in this file, and `settings.accept_int8_loss` is not set; or its
            outputs have other shapes.
    """
    label_maps = [_label_maps(run_float(photos.read(number)[0])) for number in photos.judging]
    form = format_of(settings.format)
    with _logging_kept():
        method = QUANTISERS[settings.format](folder, photos)
    run_int8 = form.load(folder, settings)
    report = {
        "method": method,
        "photos": photos.found,
        "calibrated_on": len(photos.calibrating),
        "judged_on": len(photos.judging),
        **_compared(photos, label_maps, run_int8),
    }
    for arrays in others:
        expected, result = run_float(arrays), run_int8(arrays)
        for name, array in expected.items():
            if result[name].shape != array.shape or result[name].dtype != array.dtype:
                raise ProofError(
                    f"the int8 model's {name} is {result[name].dtype} of shape {format_size(result[name].shape)}, the "
                    f"float model's {array.dtype} of shape {format_size(array.shape)}; export without --int8 (int8)"
                )
    _check(report, settings)
    return report


def _labelled(folder: Path, id2label: Mapping[int, str]) -> FolderDataset:
    """Open a dataset's folder, whose label maps must be of the model's classes."""
    dataset = open_dataset(folder, "validation" if find_splits(folder) else None)
    if dataset.id2label is not None:
        check_classes(dataset.id2label, id2label)
    dataset.id2label = dict(id2label)
    return dataset


def _listed(folder: Path) -> list[Path]:
    """Return the photos directly inside a folder, by name."""
    if not os.path.isdir(folder):
        raise DataError(f"{name_of(folder)}: there is no such folder")
    listing = list_images(folder, IMAGE_SUFFIXES)
    if listing.problems:
        raise DataError(f"{described(listing.problems)}; mend it, or take it away")
    return listing.images


# Judgement -----------------------------------------------------------------------------------------------------------


def _label_maps(outputs: Arrays) -> dict[str, NDArray[np.integer]]:
    """Return the labels of a graph's outputs: of logits (1, classes, ...) the largest, of one class 1 above 0."""
    return {
        name: array
        if array.dtype.kind in "ui"
        else (array[:, 0] > 0).astype(np.uint8)
        if array.shape[1] == 1
        else array.argmax(1)
        for name, array in outputs.items()
    }


def _compared(photos: Photos, label_maps: list[dict[str, NDArray[np.integer]]], run_int8: Runner) -> dict[str, Any]:
    """Return the share of equal labels on the photos that judge, and the mean IoU of float and int8."""
    equal = total = 0
    matrices = None
    if photos.dataset is not None:
        classes, ignored = len(photos.dataset.id2label or ()), photos.dataset.ignore_index
        matrices = {name: ConfusionMatrix(classes, ignore_index=ignored) for name in ("float", "int8")}
    for number, expected in zip(photos.judging, label_maps, strict=True):
        arrays, label = photos.read(number)
        found = _label_maps(run_int8(arrays))
        for name, labels in expected.items():
            equal += int((found[name] == labels).sum())
            total += labels.size
        if matrices is not None and label is not None:
            for matrix, result in zip(matrices.values(), (expected, found), strict=True):
                (labels,) = result.values()
                matrix.update(labels[0], _resized(label, labels.shape[1:]))
    judged: dict[str, Any] = {"agreement": equal / total}
    if matrices is not None:
        judged["mean_iou"] = {name: matrix.mean_iou for name, matrix in matrices.items()}
    return judged


def _resized(label: NDArray[np.integer], size: tuple[int, ...]) -> NDArray[np.integer]:
    """Return a label map (H, W) at another size: of each pixel the nearest."""
    rows, columns = (
        ((np.arange(wanted) + 0.5) * given / wanted).astype(int)
        for given, wanted in zip(label.shape, size, strict=True)
    )
    return label[rows[:, None], columns]


def _check(report: Mapping[str, Any], settings: ExportSettings) -> None:
    """Raise ProofError if int8 loses too much, and no one asked for it."""
    if settings.accept_int8_loss:
        return
    remedy = (
        "calibrate on more photos like those that the model is for, export without --int8 (int8), or accept the loss "
        "with --accept-int8-loss (accept_int8_loss)"
    )
    if report["agreement"] < LEAST_AGREEMENT:
        raise ProofError(
            f"int8 and float agree on {report['agreement']:.2%} of the labels of {report['judged_on']} photos, less "
            f"than {LEAST_AGREEMENT:.0%}; {remedy}"
        )
    iou = report.get("mean_iou", {"float": 0, "int8": 0})
    if not iou["float"] - iou["int8"] <= MOST_LOSS:  # NaN, of label maps that hold no class, is not, either
        raise ProofError(
            f"int8 has a mean IoU of {iou['int8']:.3f} on {report['judged_on']} photos, float {iou['float']:.3f}: a "
            f"loss above {MOST_LOSS}; {remedy}"
        )


# The two libraries ---------------------------------------------------------------------------------------------------


def _by_nncf(folder: Path, photos: Photos) -> str:
    """Quantise a folder's OpenVINO model with NNCF; return the method's name."""
    import openvino

    nncf = _nncf()
    model = core().read_model(folder / "model.xml")
    operations = [
        Operation(
            operation.get_friendly_name(),
            operation.get_type_name() in ("Convolution", "GroupConvolution"),
            [value.get_source_output().get_node().get_friendly_name() for value in operation.inputs()],
        )
        for operation in model.get_ordered_ops()
    ]
    quantised = nncf.quantize(
        model,
        nncf.Dataset(photos.calibrating, lambda number: photos.read(number)[0]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(photos.calibrating),
        ignored_scope=nncf.IgnoredScope(names=_outside(operations), validate=False),
    )
    with _replaced(folder) as temporary:
        openvino.save_model(quantised, temporary / "model.xml", compress_to_fp16=False)
    return f"NNCF {nncf.__version__}"


def _nncf() -> Any:
    """Import NNCF, so that it sends no reports."""
    variable = "NNCF_CI"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        import nncf
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
    return nncf


def _by_onnxruntime(folder: Path, photos: Photos) -> str:
    """Quantise a folder's ONNX model with ONNX Runtime's tools; return the method's name."""
    import onnx
    import onnxruntime
    from onnxruntime import quantization

    with _replaced(folder) as temporary, tempfile.TemporaryDirectory(dir=folder) as other:
        # Weights that the graph computes from weights become constants, and norms part of their convolutions.
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(other, "model.onnx"))
        onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        model = onnx.load(options.optimized_model_filepath)
        makers = {value: node.name for node in model.graph.node for value in node.output}
        operations = [
            Operation(node.name, node.op_type == "Conv", [makers[value] for value in node.input if value in makers])
            for node in model.graph.node
        ]
        constants = {tensor.name for tensor in model.graph.initializer}
        resampling = [
            node.name for node in model.graph.node if node.op_type in KINDS and node.input[1] not in constants
        ]
        quantization.quantize_static(
            options.optimized_model_filepath,
            temporary / "model.onnx",
            _Reader(photos),
            op_types_to_quantize=list(KINDS),
            nodes_to_exclude=[*_outside(operations), *resampling],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        quantised = onnx.load(temporary / "model.onnx")
        onnx.helper.set_model_props(quantised, {entry.key: entry.value for entry in model.metadata_props})
        onnx.save(quantised, temporary / "model.onnx")
    return f"onnxruntime.quantization {onnxruntime.__version__}"


KINDS = ("Conv", "Gemm", "MatMul")
"""The operators of ONNX that are quantised; in 8 bits other operators gain no time, and lose labels."""


class _Reader:
    """The photos that calibrate, as ONNX Runtime reads them."""

    def __init__(self, photos: Photos) -> None:
        self._rest = (photos.read(number)[0] for number in photos.calibrating)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next photo's inputs; None after the last."""
        return next(self._rest, None)


QUANTISERS: dict[str, Callable[[Path, Photos], str]] = {"openvino": _by_nncf, "onnx": _by_onnxruntime}
"""Quantise the model of a folder, by format."""


class Operation(NamedTuple):
    """An operation of a runtime's graph.

    Attributes:
        name: its name.
        is_convolution: whether it is a convolution.
        sources: the names of the operations that make its inputs.
    """

    name: str
    is_convolution: bool
    sources: Sequence[str]


def _outside(operations: Sequence[Operation]) -> list[str]:
    """Return the operations before the first convolutions and after the last, in an order of computation.

    They resize photos, and resample and compare logits: in 8 bits, positions and near ties would be lost.
    """
    after: set[str] = set()
    for name, is_convolution, sources in operations:
        if is_convolution or not after.isdisjoint(sources):
            after.add(name)
    before: set[str] = set()
    for name, is_convolution, sources in reversed(operations):
        if is_convolution or name in before:
            before |= {name, *sources}
    return [operation.name for operation in operations if operation.name not in after & before]


@contextlib.contextmanager
def _logging_kept() -> Iterator[None]:
    """Restore the class of loggers, which NNCF sets, and the root logger's handlers, which a warning sets."""
    loggers, handlers = logging.getLoggerClass(), list(logging.root.handlers)
    try:
        yield
    finally:
        logging.setLoggerClass(loggers)
        logging.root.handlers[:] = handlers


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files replace all files of `folder` afterwards.

    OpenVINO maps the file of weights that it reads: nothing writes into that file.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        yield Path(temporary)
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()
        for path in Path(temporary).iterdir():
            path.rename(folder / path.name)
