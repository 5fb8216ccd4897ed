"""Datasets, image files, class names and colours, augmentation, and the image processor."""

from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False  # type checkers take the name for `typing.TYPE_CHECKING`, whose import costs time
if TYPE_CHECKING:
    from fastuper.data.augment import TrainingDataset, TrainingTransform, scaled_size
    from fastuper.data.folders import SPLIT_NAMES, FolderDataset, find_splits, open_dataset
    from fastuper.data.images import ImageError, read_image, read_labels
    from fastuper.data.processor import BatchFeature, UperNetImageProcessor
    from fastuper.data.samples import IGNORE_INDEX, DataError, Sample, SampleDataset, as_samples

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

if not TYPE_CHECKING:  # a type checker takes every name for one of a module that has __getattr__
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "BatchFeature": "fastuper.data.processor",
            "DataError": "fastuper.data.samples",
            "FolderDataset": "fastuper.data.folders",
            "IGNORE_INDEX": "fastuper.data.samples",
            "ImageError": "fastuper.data.images",
            "SPLIT_NAMES": "fastuper.data.folders",
            "Sample": "fastuper.data.samples",
            "SampleDataset": "fastuper.data.samples",
            "TrainingDataset": "fastuper.data.augment",
            "TrainingTransform": "fastuper.data.augment",
            "UperNetImageProcessor": "fastuper.data.processor",
            "as_samples": "fastuper.data.samples",
            "find_splits": "fastuper.data.folders",
            "open_dataset": "fastuper.data.folders",
            "read_image": "fastuper.data.images",
            "read_labels": "fastuper.data.images",
            "scaled_size": "fastuper.data.augment",
        },
    )
