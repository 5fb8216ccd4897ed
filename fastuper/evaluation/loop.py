"""Evaluation of a model on a dataset: the model's label maps are resampled to the dataset's and counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fastuper.data.classes import classes_of
from fastuper.data.images import ImageError
from fastuper.data.samples import IGNORE_INDEX, DataError, Sample, checked_sample
from fastuper.evaluation.confusion import ConfusionMatrix
from fastuper.inference.predictor import Predictor, Prepared
from fastuper.io.messages import listed

if TYPE_CHECKING:
    from fastuper.data.processor import UperNetImageProcessor
    from fastuper.models.upernet import UperNetForSemanticSegmentation

Ready = tuple[Prepared, NDArray[np.integer]]


def evaluate(
    model: UperNetForSemanticSegmentation,
    samples: Dataset[Sample] | Iterable[Sample],
    processor: UperNetImageProcessor,
    *,
    id2label: Mapping[int, str] | None = None,
    ignore_index: int | None = None,
    short_side: int | None = None,
    window: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 1,
    workers: int = 2,
    on_sample: Callable[[], None] | None = None,
    on_failure: Callable[[DataError | ImageError], None] | None = None,
) -> ConfusionMatrix:
    """Return the confusion matrix of a model's label maps, each resampled to the size of the sample's label map.

    Memory does not grow with the number of samples. The model is in evaluation mode during the call; then its modes
    are restored. To share the work, each process passes its part of the samples,
    `torch.utils.data.Subset(dataset, range(rank, len(dataset), ranks))`; the sum of the processes' `matrix.matrix`
    (all-reduced) is the matrix of all samples.

    Args:
        model: the model; its device and dtype stay as they are.
        samples: a dataset of `fastuper.data` (or of `as_samples`), a Subset of one, or any iterable of samples.
            Threads read datasets that have a length and items by number.
        processor: the image processor, which resizes and normalizes.
        id2label: the names of the samples' classes; None takes the dataset's attribute, if it has one.
        ignore_index: the samples' label of ignored pixels; None takes the dataset's attribute, or 255 if it has none.
        short_side: as in `fastuper.inference.predictor.Predictor`.
        window: as in `Predictor`.
        stride: as in `Predictor`.
        scales: as in `Predictor`.
        flip: as in `Predictor`.
        batch_size: the number of images, or of windows, in a batch.
        workers: the number of threads that read and prepare images; 0 reads in the calling thread.
        on_sample: a function that is called after each sample.
        on_failure: a function that is called with the error of a sample that cannot be used; the evaluation then goes
            on without the sample. None raises the error.

    Raises:
        ValueError: an option is out of range, or the samples' classes differ from the model's.
        fastuper.data.samples.DataError, fastuper.data.images.ImageError: a sample cannot be used; the message names it.
        fastuper.inference.predictor.PredictionError: the model failed on images; the message names them.
    """
    predictor = Predictor(
        model,
        processor,
        short_side=short_side,
        window=window,
        stride=stride,
        scales=scales,
        flip=flip,
        batch_size=batch_size,
    )
    if id2label is None:
        id2label = _attribute(samples, "id2label", None)
    if ignore_index is None:
        ignore_index = int(_attribute(samples, "ignore_index", IGNORE_INDEX))
    names = class_names(model)
    if id2label is not None:
        check_classes(id2label, names)
    matrix = ConfusionMatrix(len(names), ignore_index=ignore_index, id2label=names, device=model.device)
    labels: deque[NDArray[np.integer]] = deque()

    def images() -> Iterator[Prepared]:
        with _prepared(samples, partial(_prepare, predictor, names, ignore_index), workers, 2 * batch_size) as ready:
            for item in ready:
                if isinstance(item, ValueError):
                    if on_failure is None:
                        raise item
                    on_failure(item)
                    if on_sample is not None:
                        on_sample()
                    continue
                image, label = item
                labels.append(label)
                yield image

    with _evaluating(model):
        for _, prediction in predictor.predict(images()):
            matrix.update(prediction, labels.popleft())
            if on_sample is not None:
                on_sample()
    return matrix


def class_names(model: UperNetForSemanticSegmentation) -> dict[int, str]:
    """Return the names of the classes in a model's label maps; a model of one class has two, 0 being the background."""
    return classes_of(model.config)


def check_classes(dataset: Mapping[int, str], model: Mapping[int, str]) -> None:
    """Check that a dataset's classes fit a model's: equal in number, and equal names have equal numbers.

    Raises:
        ValueError: the classes do not fit.
    """
    if len(dataset) != len(model):
        raise ValueError(
            f"the dataset has {_described(dataset)}, the model {_described(model)}; both must have the same"
        )
    moved = [index for index in dataset if dataset[index] != model[index]]
    if moved and set(dataset.values()) == set(model.values()):
        raise ValueError(
            f"the dataset's classes are the model's in another order (class {moved[0]} is {dataset[moved[0]]}, the "
            f"model's {model[moved[0]]}); give both the same numbers"
        )


def _described(classes: Mapping[int, str]) -> str:
    return f"{len(classes)} classes ({listed(classes[index] for index in sorted(classes))})"


def _attribute(samples: Any, name: str, default: Any) -> Any:
    """Return an attribute of a dataset, or of the dataset inside a `Subset`."""
    while not hasattr(samples, name) and hasattr(samples, "dataset"):
        samples = samples.dataset
    return getattr(samples, name, default)


def _prepare(
    predictor: Predictor, names: Mapping[int, str], ignore_index: int, read: Callable[[], Sample]
) -> Ready | DataError | ImageError:
    """Return a prepared image with its label map, or the error of a sample that cannot be used."""
    try:
        sample = checked_sample(read(), names, ignore_index)
    except (DataError, ImageError) as error:
        return error
    height, width = sample.label.shape
    return predictor.prepare(sample.image, sample.name, (height, width)), sample.label


@contextmanager
def _prepared(
    samples: Dataset[Sample] | Iterable[Sample],
    prepare: Callable[[Callable[[], Sample]], Ready | DataError | ImageError],
    workers: int,
    ahead: int,
) -> Iterator[Iterator[Ready | DataError | ImageError]]:
    """Yield an iterator of prepared samples; threads read ahead, since decoding and resizing release the GIL."""
    readers: Iterator[Callable[[], Sample]]
    if hasattr(samples, "__len__") and hasattr(samples, "__getitem__"):
        indices = range(len(samples))  # type: ignore[arg-type]
        readers = (partial(samples.__getitem__, index) for index in indices)
    else:
        readers = (partial(_itself, sample) for sample in samples)  # type: ignore[union-attr]
    if not workers:
        yield map(prepare, readers)
        return
    pool = ThreadPoolExecutor(workers)

    def results() -> Iterator[Ready | DataError | ImageError]:
        waiting: deque[Future[Ready | DataError | ImageError]] = deque()
        for read in readers:
            waiting.append(pool.submit(prepare, read))
            if len(waiting) > workers + ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


def _itself(sample: Sample) -> Sample:
    return sample


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore each module's mode at the end: frozen norms stay frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
