"""Datasets, image files, class names and colours, augmentation, and the image processor."""

from typing import TYPE_CHECKING

from fastuper.io.lazy import lazy_names

if TYPE_CHECKING:
    from fastuper.data.images import ImageError, read_image, read_labels
    from fastuper.data.processor import BatchFeature, UperNetImageProcessor
    from fastuper.data.samples import (
        IGNORE_INDEX,
        SPLIT_NAMES,
        DataError,
        FolderDataset,
        Sample,
        SampleDataset,
        TrainingDataset,
        TrainingTransform,
        as_samples,
        find_splits,
        open_dataset,
        scaled_size,
    )

__all__ = [
    "IGNORE_INDEX",
    "SPLIT_NAMES",
    "BatchFeature",
    "DataError",
    "FolderDataset",
    "ImageError",
    "Sample",
    "SampleDataset",
    "TrainingDataset",
    "TrainingTransform",
    "UperNetImageProcessor",
    "as_samples",
    "find_splits",
    "open_dataset",
    "read_image",
    "read_labels",
    "scaled_size",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BatchFeature": "fastuper.data.processor",
        "DataError": "fastuper.data.samples",
        "FolderDataset": "fastuper.data.samples",
        "IGNORE_INDEX": "fastuper.data.samples",
        "ImageError": "fastuper.data.images",
        "SPLIT_NAMES": "fastuper.data.samples",
        "Sample": "fastuper.data.samples",
        "SampleDataset": "fastuper.data.samples",
        "TrainingDataset": "fastuper.data.samples",
        "TrainingTransform": "fastuper.data.samples",
        "UperNetImageProcessor": "fastuper.data.processor",
        "as_samples": "fastuper.data.samples",
        "find_splits": "fastuper.data.samples",
        "open_dataset": "fastuper.data.samples",
        "read_image": "fastuper.data.images",
        "read_labels": "fastuper.data.images",
        "scaled_size": "fastuper.data.samples",
    },
)
