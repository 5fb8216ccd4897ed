"""Evaluation: a model's label maps of a dataset, compared with its own at their own size."""

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

from fastuper.data.samples import IGNORE_INDEX, Sample, checked_sample
from fastuper.evaluation.confusion import ConfusionMatrix
from fastuper.inference.predictor import Predictor, Prepared

if TYPE_CHECKING:
    from fastuper import UperNetConfig, UperNetForSemanticSegmentation, UperNetImageProcessor


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
) -> ConfusionMatrix:
    """Return the confusion matrix of a model's label maps, each resampled to the size of the sample's own.

    Memory does not grow with the number of samples. The model is put into evaluation mode, and back. One of several
    processes gives its share of the samples, `torch.utils.data.Subset(dataset, range(rank, len(dataset), ranks))`; the
    matrices' sum (`matrix.matrix`, all-reduced) is that of all.

    Args:
        model: where it is, in its own type.
        samples: a dataset of `fastuper.data` (or `as_samples`), a Subset of one, or any iterable of samples. Those with
            a length and numbers are read in threads.
        processor: what resizes and normalizes the images.
        id2label: the names of the samples' classes; the dataset's own where None, and not known if it has none.
        ignore_index: the samples' label of pixels that count nowhere; likewise, and 255.
        short_side: this and the next four: see `fastuper.inference.predictor.Predictor`.
        window: see there.
        stride: see there.
        scales: see there.
        flip: see there.
        batch_size: how many images, or windows of images, go through the model together.
        workers: how many threads read and prepare images; 0 for none.
        on_sample: called after each sample.

    Raises:
        ValueError: an option has no meaning, or the samples' classes are not the model's.
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
            for image, label in ready:
                labels.append(label)
                yield image

    with _evaluating(model):
        for _, prediction in predictor.predict(images()):
            matrix.update(prediction, labels.popleft())
            if on_sample is not None:
                on_sample()
    return matrix


def class_names(model: UperNetForSemanticSegmentation) -> dict[int, str]:
    """Return the names of the classes that label maps have: the configuration's, or two for a model of one class."""
    return classes_of(model.config)


def classes_of(config: UperNetConfig) -> dict[int, str]:
    """Return likewise those of a model with this configuration."""
    if config.num_labels == 1:
        return {0: "background", 1: str(config.id2label[0])}
    return {index: str(config.id2label.get(index, f"class {index}")) for index in range(config.num_labels)}


def check_classes(dataset: Mapping[int, str], model: Mapping[int, str]) -> None:
    """See that a dataset's classes can be a model's.

    Raises:
        ValueError: they are not as many, or the same names have other numbers.
    """
    if len(dataset) != len(model):
        raise ValueError(f"the dataset has {_some(dataset)}, the model {_some(model)}; both must have the same")
    moved = [index for index in dataset if dataset[index] != model[index]]
    if moved and set(dataset.values()) == set(model.values()):
        raise ValueError(
            f"the dataset's classes are the model's in another order (class {moved[0]} is {dataset[moved[0]]}, the "
            f"model's {model[moved[0]]}); give both the same numbers"
        )


def _some(classes: Mapping[int, str]) -> str:
    names = [str(classes[index]) for index in sorted(classes)[:3]]
    return f"{len(classes)} classes ({', '.join(names)}{', ...' if len(classes) > 3 else ''})"


def _attribute(samples: Any, name: str, default: Any) -> Any:
    """Return an attribute of a dataset, also of one that `Subset`s are taken from."""
    while not hasattr(samples, name) and hasattr(samples, "dataset"):
        samples = samples.dataset
    return getattr(samples, name, default)


def _prepare(
    predictor: Predictor, names: Mapping[int, str], ignore_index: int, read: Callable[[], Sample]
) -> tuple[Prepared, NDArray[np.integer]]:
    sample = checked_sample(read(), names, ignore_index)
    height, width = sample.label.shape
    return predictor.prepare(sample.image, sample.name, (height, width)), sample.label


@contextmanager
def _prepared(
    samples: Dataset[Sample] | Iterable[Sample],
    prepare: Callable[[Callable[[], Sample]], tuple[Prepared, NDArray[np.integer]]],
    workers: int,
    ahead: int,
) -> Iterator[Iterator[tuple[Prepared, NDArray[np.integer]]]]:
    """Give the samples, read and prepared in threads: their work is decoding and resizing, which lets others run."""
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

    def results() -> Iterator[tuple[Prepared, NDArray[np.integer]]]:
        waiting: deque[Future[tuple[Prepared, NDArray[np.integer]]]] = deque()
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
    """Put a model into evaluation mode for a while; norms that were frozen in it stay so afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
