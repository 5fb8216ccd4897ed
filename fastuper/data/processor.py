"""The image processor: photos to `pixel_values`, label maps to `labels`, logits to label maps.

`UperNetImageProcessor` reads the `preprocessor_config.json` of UPerNet checkpoints. These files name Transformers'
`SegformerImageProcessor`; the results equal those of its Pillow backend bit for bit, without Transformers or
torchvision.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import warnings
from collections import UserDict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypedDict

import numpy as np
import PIL.Image
import torch
from torch.nn import functional as F

from fastuper.data.bilinear import interpolate
from fastuper.data.images import (
    ImageError,
    as_grey,
    as_labels,
    as_rgb,
    holds_32_bits,
    open_image,
    read_image,
    read_labels,
)
from fastuper.data.sizes import SizeDict, checked_size, output_size
from fastuper.io.arguments import take_arguments
from fastuper.io.bounds import check_bounds, plain
from fastuper.io.files import read_json
from fastuper.io.hub import HubOptions, find_file, upload
from fastuper.io.messages import format_size, listed, shown
from fastuper.weights.dialects import is_foreign
from fastuper.weights.official import PREPROCESSING
from fastuper_kernels import upsample_argmax
from fastuper_kernels.dispatch.files import atomic_path
from fastuper_kernels.ops.upsample_cross_entropy import as_two_classes

logger = logging.getLogger("fastuper")

Image: TypeAlias = "PIL.Image.Image | np.ndarray | torch.Tensor | str | os.PathLike[str]"
Images: TypeAlias = "Image | Sequence[Image]"

CONFIG_FILE = "preprocessor_config.json"
OPTIONS = (
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_reduce_labels",
)
# Options that are None unless they are given; only then are they written to the file.
MORE_OPTIONS = (
    "do_convert_rgb",
    "default_to_square",
    "return_tensors",
    "device",
    "data_format",
    "input_data_format",
    "size_divisor",
    "antialias",
    "do_flip_channel_order",
)
FLAGS = (
    "do_resize",
    "do_rescale",
    "do_normalize",
    "do_reduce_labels",
    "do_convert_rgb",
    "default_to_square",
    "antialias",
    "do_flip_channel_order",
)
LAYOUTS = (None, "channels_first", "channels_last")
# Options of Transformers' class without an effect there or here; the others must be empty or False.
NO_EFFECT = ("disable_grouping", "image_seq_length")
NO_STEP = {
    "do_center_crop": "images are not cropped",
    "crop_size": "images are not cropped",
    "do_pad": "images are not padded",
    "pad_size": "images are not padded",
}
# Files of other classes are refused: they may demand a crop or a padding, which this class does not do.
READ_TYPES = (
    "SegformerImageProcessor",
    "SegformerImageProcessorFast",
    "SegformerImageProcessorPil",
    "SegformerFeatureExtractor",
    "UperNetImageProcessor",
)
WRITTEN_TYPE = "SegformerImageProcessor"
# The type of a file with options that Transformers' class lacks: it would ignore them, and give other pixels.
OWN_TYPE = "UperNetImageProcessor"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The number of rows of 8-bit pixels that are looked up in a table at a time.
ROWS = 64

# An argument that was left out; None is a value.
_LEFT_OUT: Any = object()


class UperNetImageProcessorKwargs(TypedDict, total=False):
    """The options of `UperNetImageProcessor`, and of each of its calls."""

    do_resize: bool | None
    size: Mapping[str, int] | Sequence[int] | int | None
    resample: int | None
    do_rescale: bool | None
    rescale_factor: float | None
    do_normalize: bool | None
    image_mean: float | Sequence[float] | None
    image_std: float | Sequence[float] | None
    do_reduce_labels: bool | None
    do_convert_rgb: bool | None
    default_to_square: bool | None
    return_tensors: str | None
    device: torch.device | str | int | None
    data_format: str | None
    input_data_format: str | None
    size_divisor: int | None
    antialias: bool | None
    do_flip_channel_order: bool | None


class BatchFeature(UserDict[str, Any]):
    """A dictionary of arrays whose keys are also attributes, as in Transformers' class of this name.

    `model(**inputs)` passes its arrays to a model.
    """

    def __getattr__(self, name: str) -> Any:
        # While an instance is copied or unpickled it has no `data`: reading `self.data` then would recurse forever.
        if name == "data" or name not in self.data:
            raise AttributeError(f"no {name!r} here; there are {sorted(self.__dict__.get('data', ()))}")
        return self.data[name]

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Move every tensor to a device and cast the floating-point ones to a dtype, in place.

        Args:
            *args: as in `torch.Tensor.to`: a device, a dtype, or a device and a dtype.
            **kwargs: `device`, `dtype` and `non_blocking`, as in `torch.Tensor.to`.

        Returns:
            This object. Labels keep their integer dtype, and lists of numpy arrays stay as they are.

        Raises:
            TypeError: the first argument is neither a device nor a dtype.
        """
        device = kwargs.get("device")
        if device is None and args:
            if isinstance(args[0], (str, int, torch.device)):
                device = args[0]
            elif not isinstance(args[0], torch.dtype):
                raise TypeError(f"to() takes a device or a dtype, not {type(args[0]).__name__}")
        for key, value in self.data.items():
            if not isinstance(value, torch.Tensor):
                continue
            if value.is_floating_point():
                self.data[key] = value.to(*args, **kwargs)
            elif device is not None:
                self.data[key] = value.to(device=device, non_blocking=kwargs.get("non_blocking", False))
        return self


class UperNetImageProcessor:
    """Resize, rescale and normalize images; resize and renumber their segmentation maps.

    The steps are: resize with Pillow in 8 bits; multiply by `rescale_factor` in float64 and round to float32; subtract
    `image_mean`; divide by `image_std`. Values and dtype of the result equal those of `SegformerImageProcessorPil` of
    Transformers 5.x and of `SegformerImageProcessor` of 4.56 bit for bit.

    If torchvision is installed, `AutoImageProcessor` of Transformers 5.x prefers another backend, which rounds the
    resized pixels differently. The difference was measured over four photographs (scikit-image's astronaut, chelsea,
    coffee and rocket) and four sizes (512 x 512, 384 x 640, 333 x 517, 1024 x 768) with torchvision 0.29.2. No pixel
    differs by more than one of 256 levels, 0.0175 in `pixel_values`. The mean difference of an image is at most 0.15
    levels, 0.0026, and below 0.013 levels in 13 of the 16 cases. In a segmentation map that backend may choose another
    of two equally near pixels.

    Image files and open images are decoded by the rule in `fastuper.data.images`. Image files have the pixels that
    Transformers 5.x reads from them, except 16-bit grey, which Transformers clips to white, and 32-bit values.

    The other differences from Transformers' class, each a case in which that class fails, guesses or changes its
    input:

    - Open PIL images are converted to the number of channels of `image_mean`: to RGB for three, to grey for one.
      For three channels, Transformers' class raises an error for grey, palette, 1-bit, alpha and CMYK images (without
      normalization it returns the channels of the mode). It takes YCbCr, HSV and LAB for RGB. For one channel, it takes
      palette indices for grey, and 1-bit images for 0 and 1. If `image_mean` and `image_std` are single numbers, open
      grey images have one channel and all others three.
    - Open images of 32-bit integers and floats (modes I and F) count as arrays of numbers, as in Transformers' class;
      with three channels they are refused. 16-bit grey is scaled to 8 bits, also if nothing is resized.
    - Arrays are never converted, because nothing names the colours of their channels: the number of channels must be
      that of `image_mean`.
    - Images of more than four channels are resized channel by channel. (Images of two and four channels are resized
      as in Transformers' class: Pillow weights the other channels by the last, which it takes for alpha.)
    - The dimension of the channels is determined by the length of `image_mean`, and guessed only without it.
    - `data_format` has an effect, and None as an option of a call keeps the processor's value, as in 4.56; 5.x
      ignores `data_format` and takes None for False.
    - Options without an effect in Transformers' class (`do_center_crop`, `crop_size`, `do_pad`, `pad_size`) must be
      None or False.
    - Segmentation maps may hold labels outside 0 to 255 (int32) and may be given as files, and `do_reduce_labels`
      does not change the caller's array. Boolean maps become 0 and 1.
    - The old name `reduce_labels`, which Transformers ignores today, means `do_reduce_labels`.
    - `size_divisor`, `antialias` and `do_flip_channel_order` are options that Transformers' class lacks. A file with
      one of them names `UperNetImageProcessor`, which Transformers refuses.

    Args:
        do_resize: resize images and maps to `size`.
        size: `{"height": ..., "width": ...}`, a pair (height, width), or one number for a square. Default 512 x 512.
            The aspect ratio is kept by `{"shortest_edge": ...}`, the length of the shorter side; by
            `{"shortest_edge": ..., "longest_edge": ...}`, which also limits the longer side; and by
            `{"max_height": ..., "max_width": ...}`, the largest size inside a frame.
        resample: Pillow's filter for images, `PIL.Image.Resampling` or its number; maps always use the nearest pixel.
        do_rescale: multiply the images by `rescale_factor`.
        rescale_factor: the factor; 1 / 255 maps 8-bit levels to 0 to 1.
        do_normalize: subtract `image_mean`, divide by `image_std`.
        image_mean: one number per channel, or one for all channels. Default: ImageNet's, in RGB order.
        image_std: one number per channel, or one for all channels. Default: ImageNet's.
        do_reduce_labels: label 0 becomes 255 (ignored by the loss) and every other label one less, as in ADE20K.
        reduce_labels: the old name of `do_reduce_labels`.
        do_convert_rgb: True to convert all images to RGB, arrays too; what shines through is white.
        default_to_square: False if one number as `size` is the length of the shorter side.
        return_tensors: for calls that do not say it; see `preprocess` for this and the next three.
        device: for calls that do not say it.
        data_format: for calls that do not say it.
        input_data_format: for calls that do not say it.
        size_divisor: round both sides up to a multiple of this number; the image is stretched, not padded. Before that,
            the size of `shortest_edge` is truncated as in Unified Perceptual Parsing, see
            `fastuper.data.sizes.output_size`.
        antialias: False to interpolate between four pixels, also where an image shrinks, as OpenCV's `INTER_LINEAR`
            does; `resample` must then be bilinear. Otherwise Pillow resizes.
        do_flip_channel_order: True to reverse the three channels of the result, RGB to BGR; `image_mean` and
            `image_std` are in the result's order.
        **ignored: arguments of Transformers' classes, at the values that do nothing.

    Each option is an attribute. A subclass may define class attributes, which replace the defaults.

    Raises:
        TypeError, ValueError: an option is of a wrong type or out of range; the message names it.
    """

    model_input_names: ClassVar[Sequence[str]] = ("pixel_values",)
    valid_kwargs: ClassVar[type] = UperNetImageProcessorKwargs
    backend: ClassVar[str] = "pil"
    is_fast: ClassVar[bool] = False

    do_resize: bool | None = True
    size: Any = SizeDict(height=512, width=512)
    resample: int = PIL.Image.Resampling.BILINEAR
    do_rescale: bool | None = True
    rescale_factor: float = 1 / 255
    do_normalize: bool | None = True
    image_mean: Any = IMAGENET_MEAN
    image_std: Any = IMAGENET_STD
    do_reduce_labels: bool | None = False
    default_to_square: bool | None = True
    # These steps are never done.
    crop_size: ClassVar[None] = None
    do_center_crop: ClassVar[None] = None
    do_pad: ClassVar[None] = None
    pad_size: ClassVar[None] = None
    disable_grouping: ClassVar[None] = None
    image_seq_length: ClassVar[None] = None

    def __init__(
        self,
        do_resize: bool | None = _LEFT_OUT,
        size: Mapping[str, int] | Sequence[int] | int | None = None,
        resample: int | None = None,
        do_rescale: bool | None = _LEFT_OUT,
        rescale_factor: float | None = None,
        do_normalize: bool | None = _LEFT_OUT,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_reduce_labels: bool | None = _LEFT_OUT,
        *,
        reduce_labels: bool = False,
        do_convert_rgb: bool | None = None,
        default_to_square: bool | None = None,
        return_tensors: str | None = None,
        device: torch.device | str | int | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        size_divisor: int | None = None,
        antialias: bool | None = None,
        do_flip_channel_order: bool | None = None,
        **ignored: Any,
    ) -> None:
        _check_overrides(type(self).__name__, ignored, ())
        own = type(self)

        def flag(name: str, value: bool | None) -> bool | None:
            value = getattr(own, name) if value is _LEFT_OUT else value
            return None if value is None else bool(value)

        square = own.default_to_square if default_to_square is None else default_to_square
        self.do_resize = flag("do_resize", do_resize)
        self.size = checked_size(own.size if size is None else size, bool(square))
        self.resample = _checked_resample(own.resample if resample is None else resample)
        self.do_rescale = flag("do_rescale", do_rescale)
        rescale_factor = own.rescale_factor if rescale_factor is None else plain(rescale_factor)
        check_bounds({"rescale_factor": rescale_factor})
        self.rescale_factor = float(rescale_factor)
        self.do_normalize = flag("do_normalize", do_normalize)
        self.image_mean = _checked_statistic("image_mean", own.image_mean if image_mean is None else image_mean)
        self.image_std = _checked_statistic("image_std", own.image_std if image_std is None else image_std)
        self.do_reduce_labels = reduce_labels or flag("do_reduce_labels", do_reduce_labels)
        self.do_convert_rgb = do_convert_rgb
        if default_to_square is not None:
            self.default_to_square = bool(default_to_square)
        self.return_tensors = _checked_choice("return_tensors", return_tensors, (None, "pt", "np"))
        self.device = device
        self.data_format = _checked_choice("data_format", data_format, LAYOUTS)
        self.input_data_format = _checked_choice("input_data_format", input_data_format, LAYOUTS)
        if size_divisor is not None:
            check_bounds({"size_divisor": size_divisor})
        self.size_divisor = size_divisor
        self.antialias = antialias
        if antialias is False and self.resample != PIL.Image.Resampling.BILINEAR:
            raise ValueError(f"antialias=False is bilinear, and resample is {self.resample}; leave out one of them")
        self.do_flip_channel_order = do_flip_channel_order
        # Unknown keys of the configuration file: `save_pretrained` writes them again.
        self.extra: dict[str, Any] = {}
        if self.do_normalize:
            if np.any(np.asarray(self.image_std) == 0):
                raise ValueError(f"image_std is {self.image_std}; a zero in it would divide by zero")
            if _length(self.image_mean) and _length(self.image_std) not in (None, _length(self.image_mean)):
                raise ValueError(f"image_mean {self.image_mean} and image_std {self.image_std} differ in length")

    @classmethod
    def for_parsing(cls, **options: Any) -> UperNetImageProcessor:
        """Return the preprocessing of Unified Perceptual Parsing's official code (CSAILVision/unifiedparsing).

        The shorter side becomes 450 and the longer at most 1000; both are rounded up to a multiple of 8. The pixels are
        OpenCV's, 0 to 255, in the order BGR, less Caffe's means.

        Args:
            **options: constructor arguments, in place of these.

        Raises:
            TypeError, ValueError: an option is of a wrong type or out of range; the message names it.
        """
        return cls(**{**PREPROCESSING, **options})

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        subfolder: str = "",
        revision: str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        return_unused_kwargs: bool = False,
        source_options: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> Any:
        """Read the `preprocessor_config.json` of a checkpoint, or what the checkpoint of another library says itself.

        Args:
            source: a folder, the file itself, or the id of a Hub repository; or the checkpoint of another library, a
                file or a folder. What such a checkpoint does not say has this class's defaults; a warning says so.
            token: the Hub's access token, for private repositories.
            cache_dir: the folder of downloads.
            subfolder: the file's folder inside the source.
            revision: a branch, tag or commit of the repository.
            local_files_only: use cached files only; download nothing.
            force_download: download the file again, even if the cache has it.
            return_unused_kwargs: True to return the processor and a dictionary of the unknown overrides, in place of an
                error.
            source_options: for the checkpoint of another library, as in the model's `from_pretrained`.
            **overrides: constructor arguments that replace values of the file. `image_processor_filename` is another
                name of the file.

        Raises:
            CheckpointError: the checkpoint of another library cannot be converted.
            OSError: there is no such file, or it is not JSON.
            TypeError: an override is unknown.
            ValueError: the file belongs to another class, or an option is out of range.
        """
        filename = overrides.pop("image_processor_filename", CONFIG_FILE)
        options = HubOptions(token, cache_dir, subfolder or "", revision, local_files_only, force_download)
        options = take_arguments(cls.__name__, overrides, options)
        unused = {}
        if return_unused_kwargs:
            known = (*OPTIONS, *MORE_OPTIONS, *NO_EFFECT, *NO_STEP, "reduce_labels")
            unused = {name: overrides.pop(name) for name in list(overrides) if name not in known}
        # Before the file is read: an error in an override must not name the file.
        overrides = _checked_overrides(cls.__name__, overrides)
        path: str | os.PathLike[str]
        if not options.subfolder and is_foreign(source) and not (Path(source) / filename).is_file():
            from fastuper.weights.convert import read_converted  # every dialect, which other uses need not load

            path, values = source, dict(read_converted(source, source_options).preprocessing)
            if not values:
                logger.warning("%s does not say how images are prepared: the default settings are used", source)
        elif source_options:
            raise TypeError(f"source_options are for the checkpoint of another library, and {source} is none")
        else:
            path = _find_options(source, filename, options)
            values = read_json(path)
        try:
            processor = cls.from_dict(values, **overrides)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None
        return (processor, unused) if return_unused_kwargs else processor

    @classmethod
    def get_image_processor_dict(
        cls, source: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the content of `preprocessor_config.json`, and the arguments that are not about finding the file.

        Args:
            source: a folder, the file itself, or the id of a Hub repository.
            **kwargs: arguments of `from_pretrained`.

        Raises:
            OSError: there is no such file, or it is not JSON.
        """
        filename = kwargs.pop("image_processor_filename", CONFIG_FILE)
        given = {field.name: kwargs.pop(field.name) for field in fields(HubOptions) if field.name in kwargs}
        given["subfolder"] = given.get("subfolder") or ""
        options = take_arguments(cls.__name__, kwargs, HubOptions(**given))
        return read_json(_find_options(source, filename, options)), kwargs

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **overrides: Any) -> UperNetImageProcessor:
        """Build a processor from the content of a `preprocessor_config.json`; `extra` keeps its unknown keys.

        Raises:
            TypeError: an override is unknown.
            ValueError: the content belongs to another class, or an option is out of range.
        """
        config = {**config, **_checked_overrides(cls.__name__, overrides)}
        kind = config.pop("image_processor_type", None)
        # Older files have this key; Transformers drops it as misleading.
        kind = kind or config.pop("feature_extractor_type", None)
        config.pop("feature_extractor_type", None)
        if kind not in (None, *READ_TYPES):
            raise ValueError(
                f"{CONFIG_FILE} is for {kind}, which may work differently; load it with transformers' "
                "AutoImageProcessor, or pass its values to UperNetImageProcessor(...)"
            )
        if (reduce_labels := config.pop("reduce_labels", None)) is not None:
            config.setdefault("do_reduce_labels", reduce_labels)
        given = {name: config.pop(name) for name in (*OPTIONS, *MORE_OPTIONS) if name in config}
        processor = cls(**{name: value for name, value in given.items() if value is not None or name in FLAGS})
        processor.extra = config
        return processor

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> UperNetImageProcessor:
        """Build a processor from the file that `to_json_file` wrote.

        Raises:
            OSError: the file cannot be read, or is not JSON; the message names it.
            ValueError: the file belongs to another class, or an option is out of range.
        """
        return cls.from_dict(read_json(Path(json_file)))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `preprocessor_config.json`.

        Transformers loads it as `SegformerImageProcessor`, unless an option is set that this class lacks.
        """
        more = {name: getattr(self, name) for name in MORE_OPTIONS if vars(self).get(name) is not None}
        if "device" in more:
            more["device"] = str(more["device"])
        own = self.size_divisor is not None or self.antialias is False or self.do_flip_channel_order
        kind = OWN_TYPE if own else WRITTEN_TYPE
        options = {**self.extra, **self._options(OPTIONS), **more, "image_processor_type": kind}
        return {**options, "size": dict(options["size"])}

    def to_json_string(self) -> str:
        """Return the text of `preprocessor_config.json`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the text of `preprocessor_config.json` to a file."""
        text = self.to_json_string()
        with atomic_path(json_file_path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        push_to_hub: bool = False,
        *,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> list[str]:
        """Write `preprocessor_config.json` into a folder, which is created if it is missing.

        Args:
            folder: the folder.
            push_to_hub: also upload the file.
            safe_serialization: no effect, since there are no weights; Transformers' pipelines pass it to every
                `save_pretrained`.
            **kwargs: with `push_to_hub`, `repo_id` (by default the folder's name) and the other arguments of the
                method `push_to_hub`.

        Returns:
            A list with the path of the file.

        Raises:
            NotADirectoryError: `folder` is a file.
            TypeError: an argument is unknown.
        """
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained has no argument {', '.join(kwargs)}, or only with push_to_hub=True")
        path = Path(folder) / CONFIG_FILE
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(f"{folder} is a file; save_pretrained writes a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.to_json_file(path)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", path.parent.absolute().name), **kwargs)
        return [str(path)]

    def push_to_hub(self, repo_id: str, *, commit_message: str | None = None, **kwargs: Any) -> str:
        """Upload `preprocessor_config.json` to a Hub repository; it is made if it is missing.

        Args:
            repo_id: "name" or "organization/name".
            commit_message: of the commit.
            **kwargs: `private`, `token`, `revision` and `create_pr`, as for the model.

        Returns:
            The commit's URL.

        Raises:
            OSError: the Hub refused the request.
        """
        message = commit_message or "Upload image processor"
        with tempfile.TemporaryDirectory() as folder:
            self.to_json_file(Path(folder) / CONFIG_FILE)
            return upload(Path(folder), [CONFIG_FILE], repo_id, commit_message=message, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def __call__(self, images: Images, segmentation_maps: Images | None = None, **options: Any) -> BatchFeature:
        """Call `preprocess`."""
        return self.preprocess(images, segmentation_maps, **options)

    def preprocess(
        self,
        images: Images,
        segmentation_maps: Images | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Turn images, and their segmentation maps, into the model's inputs.

        Args:
            images: one image or a list: PIL images, paths of files, numpy arrays or tensors of shape (H, W, C) or
                (C, H, W), or batches of arrays with one more dimension. Values are 8-bit levels, as integers or
                floats, or floats from 0 to 1 with `do_rescale=False`. Without resizing, any numbers are accepted.
            segmentation_maps: one map per image, of its size: PIL images of one channel (L, P, I, 1), paths of files,
                or integer arrays or tensors of shape (H, W) or (N, H, W).
            **overrides: constructor arguments, for this call only; None keeps the processor's value. Those about the
                call itself are

                - `return_tensors`: "pt" for tensors, "np" for arrays, both with a batch dimension; None for lists of
                  arrays;
                - `device`: the device of the tensors, with `return_tensors="pt"`;
                - `data_format`: "channels_first" for (C, H, W) results, "channels_last" for (H, W, C);
                - `input_data_format`: the layout of arrays and tensors, by the same names. None determines it from the
                  shape.

        Returns:
            `pixel_values`: float32 (N, C, height, width); the images' dtype if no step changes values, their floating
            dtype if `do_rescale` and `do_resize` are off. With maps, `labels`: int64 (N, height, width).

        Raises:
            TypeError: an item is no image, a list mixes kinds, or an override is unknown.
            ValueError: values, channels, sizes or counts do not fit; the message names the image and the remedy.
            fastuper.data.images.ImageError: a file cannot be used (a ValueError; a FileNotFoundError too if the file
                is missing).
        """
        overrides = _checked_overrides(type(self).__name__, overrides)
        # Users may have changed attributes since the constructor checked them: a new processor checks them again.
        given = {name: value for name, value in overrides.items() if value is not None}
        own = UperNetImageProcessor(**{**self._options((*OPTIONS, *MORE_OPTIONS)), **given})

        pictures = _flat_list("images", images, 3)
        maps = None if segmentation_maps is None else _flat_list("segmentation_maps", segmentation_maps, 2)
        if maps is not None and len(maps) != len(pictures):
            raise ValueError(f"{len(maps)} segmentation_maps for {len(pictures)} images; give one map per image")

        pixel_values, labels = [], []
        for index, picture in enumerate(pictures):
            name = f"images[{index}]"
            layout = own.input_data_format
            if own.do_convert_rgb:
                picture, layout = _over_white(name, picture, layout)
            opened = own._open_image(name, picture, layout)
            if maps is not None:
                label_map = _open_map(f"segmentation_maps[{index}]", maps[index])
                size = _height_width(opened)
                if label_map.shape != size:
                    raise ValueError(
                        f"segmentation_maps[{index}] is {format_size(label_map.shape)} and {name} {format_size(size)} "
                        "(height x width); an image and its map must have the same size"
                    )
                labels.append(own._finish_map(f"segmentation_maps[{index}]", label_map))
            pixels = own._finish_image(name, opened)
            if own.data_format == "channels_last":
                pixels = np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
            pixel_values.append(pixels)

        data = BatchFeature({"pixel_values": pixel_values})
        if maps is not None:
            data["labels"] = labels
        if own.return_tensors is not None:
            for key, arrays in data.items():
                batch = _stack(key, arrays)
                data[key] = torch.from_numpy(batch).to(own.device) if own.return_tensors == "pt" else batch
        return data

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Any]:
        """Return the label of each pixel: the largest class of the logits, resized bilinearly to each target size.

        Args:
            outputs: the model's output; `outputs.logits` is (N, num_labels, h, w).
            target_sizes: (height, width) of each image, N pairs or an (N, 2) tensor. None keeps the logits' size.
            return_segmentation_scores: True to return the resized logits too.

        Returns:
            N int64 tensors of shape (height, width), on the logits' device. Of equal logits the first class counts.
            With a single class the label is 1 where its logit is above 0. With `return_segmentation_scores`, N
            dictionaries whose keys are also attributes: `segmentation`, this tensor, and `segmentation_scores`, the
            logits (num_labels, height, width) in their dtype.

        Raises:
            ValueError: the number of target sizes is not N, or they are not pairs of integers from 1.
        """
        logits = as_two_classes(outputs.logits)
        if isinstance(target_sizes, torch.Tensor):
            target_sizes = target_sizes.tolist()
        if target_sizes is None:
            labels = list(logits.argmax(dim=1))
        elif len(target_sizes) != len(logits):
            raise ValueError(
                f"{len(target_sizes)} target_sizes for {len(logits)} images; give one (height, width) per image"
            )
        else:
            labels = [upsample_argmax(logits[i : i + 1], [size])[0] for i, size in enumerate(target_sizes)]
        if not return_segmentation_scores:
            return labels
        scores = outputs.logits.split(1)
        resized = [F.interpolate(s, x.shape, mode="bilinear")[0] for s, x in zip(scores, labels, strict=True)]
        return [
            BatchFeature({"segmentation": x, "segmentation_scores": s}) for x, s in zip(labels, resized, strict=True)
        ]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) of the result for an image of this size.

        Raises:
            ValueError: `size` does not say, or a side would have no pixels.
        """
        if not self.do_resize:
            return height, width
        return output_size(checked_size(self.size), height, width, self.size_divisor)

    def resize(
        self, image: np.ndarray, size: Mapping[str, int], resample: int | None = None, **ignored: Any
    ) -> np.ndarray:
        """Resize an array (C, H, W) of 8-bit levels, or of fractions of 1, with one of Pillow's filters (bilinear).

        Raises:
            ValueError: the size or the filter is not valid, or the values are neither.
        """
        _check_overrides(type(self).__name__, ignored, ())
        resample = PIL.Image.Resampling.BILINEAR if resample is None else resample
        return UperNetImageProcessor(size=size, resample=resample)._resize("image", image)

    def rescale(self, image: np.ndarray, scale: float, **ignored: Any) -> np.ndarray:
        """Multiply an array by a factor in float64; return float32."""
        _check_overrides(type(self).__name__, ignored, ())
        return _rescale(image, scale)

    def normalize(
        self, image: np.ndarray, mean: float | Sequence[float], std: float | Sequence[float], **ignored: Any
    ) -> np.ndarray:
        """Subtract the mean from an array (C, H, W) and divide it by the standard deviation; floats keep their dtype.

        Raises:
            ValueError: the statistics are not valid, or not of the image's length.
        """
        _check_overrides(type(self).__name__, ignored, ())
        own = UperNetImageProcessor(image_mean=mean, image_std=std, do_rescale=False)
        if own._channels() not in (None, len(image)):
            raise ValueError(f"the image has {len(image)} channels, mean and std are for {own._channels()}")
        return own._compute(image)

    def reduce_label(self, image: np.ndarray) -> np.ndarray:
        """Return a label map whose label 0 has become 255, and every other label but 255 one less."""
        return np.where(image == 0, 255, np.where(image == 255, 255, image - 1)).astype(image.dtype)

    def _options(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the current values of constructor arguments."""
        return {name: getattr(self, name) for name in names}

    def _channels(self) -> int | None:
        """Return the number of channels of the statistics; None if they are single numbers."""
        return _length(self.image_mean) or _length(self.image_std)

    def _open_image(self, name: str, image: Image, input_data_format: str | None) -> PIL.Image.Image | np.ndarray:
        """Return an image as a PIL image of mode L or RGB, or as a checked view (C, H, W) of an array."""
        channels = self._channels()
        if isinstance(image, (str, os.PathLike)):
            try:
                if channels in (None, 3):  # Transformers makes every file RGB
                    return read_image(image)
                image = open_image(image)
            except ImageError as error:
                raise type(error)(f"{name}: {error}") from None
        elif channels in (None, 1) and isinstance(image, PIL.Image.Image) and holds_32_bits(image):
            image, input_data_format = np.asarray(image)[None], "channels_first"
        if isinstance(image, PIL.Image.Image):
            if 0 in image.size:
                raise ValueError(f"{name} is {format_size(_height_width(image))} (height x width): it has no pixels")
            image = self._convert_mode(name, image)
            if image.mode in ("L", "RGB"):
                return image
            return np.moveaxis(np.asarray(image), -1, 0)
        array = _numpy(name, image)
        if 0 in array.shape:
            raise ValueError(f"{name} has shape {array.shape}: it has no pixels")
        array = self._channels_first(name, array, input_data_format)
        self._check_values(name, array)
        return array

    def _convert_mode(self, name: str, image: PIL.Image.Image) -> PIL.Image.Image:
        """Return a PIL image converted to the number of channels of the statistics."""
        channels = self._channels()
        if channels is None:
            channels = 1 if image.mode in ("1", "L", "LA") else 3
        if channels == 3:
            return as_rgb(image, name)
        if channels == 1:
            return as_grey(image, name)
        if self.do_normalize and len(image.getbands()) != channels:
            raise ValueError(
                f"{name} has mode {image.mode} with {len(image.getbands())} channels, image_mean is for {channels}; "
                "pass an array of as many channels"
            )
        return image if len(image.getbands()) > 1 else as_grey(image, name)

    def _channels_first(self, name: str, array: np.ndarray, layout: str | None) -> np.ndarray:
        """Return a view (C, H, W) of an array in either layout."""
        channels = self._channels()
        strict = self.do_normalize and channels is not None
        if layout is None:
            # As in Transformers, 1, 3 and 4 are likely numbers of channels. If both dimensions are likely, the first
            # counts.
            likely = (channels,) if strict else (1, 3, 4, channels)
            first, last = array.shape[0] in likely, array.shape[-1] in likely
            if first and last:
                warnings.warn(
                    f"an image has shape {array.shape}: taking the first dimension for the channels; "
                    "pass input_data_format if that is wrong",
                    stacklevel=5,
                )
            if not first and not last:
                wanted = f"the {channels} channels of image_mean" if strict else "1, 3 or 4 channels"
                raise ValueError(
                    f"{name} has shape {array.shape}, where neither the first nor the last dimension is {wanted}; "
                    "repeat a grey image to 3 channels, drop alpha, give image_mean and image_std of the right length, "
                    "or, for other channels, input_data_format"
                )
            layout = "channels_first" if first else "channels_last"
        array = array if layout == "channels_first" else np.moveaxis(array, -1, 0)
        if strict and len(array) != channels:
            raise ValueError(
                f"{name} has {len(array)} channels ({layout}), image_mean is for {channels}; "
                "give image_mean and image_std of the image's length, or another input_data_format"
            )
        return array

    def _check_values(self, name: str, array: np.ndarray) -> None:
        """Raise ValueError for NaN and infinity; warn if all values are from 0 to 1 and rescaling follows."""
        if array.dtype == np.uint8:
            return
        low, high = array.min(), array.max()  # NaN if any value is NaN
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name} holds NaN or infinite values; replace them (numpy.nan_to_num) first")
        if self.do_rescale and low >= 0 and high <= 1:
            # Python shows a warning of the same text once: the text must not depend on the image.
            warnings.warn(
                "an image has values from 0 to 1 only, as if rescaled already; pass do_rescale=False unless its levels "
                "are from 0 to 255",
                stacklevel=5,
            )

    def _finish_image(self, name: str, image: PIL.Image.Image | np.ndarray) -> np.ndarray:
        """Resize, rescale and normalize an opened image; return a new array (C, height, width)."""
        if self.do_resize:
            pixels = self._resize(name, image)
        elif isinstance(image, PIL.Image.Image):
            pixels = _pil_channels_first(image)
        else:
            pixels = image
        if self.do_flip_channel_order:
            if len(pixels) != 3:
                raise ValueError(f"{name} has {len(pixels)} channels; do_flip_channel_order reverses three, RGB to BGR")
            pixels = pixels[::-1]
        if not (self.do_rescale or self.do_normalize):
            return np.array(pixels, order="C")
        if pixels.dtype != np.uint8:
            return self._compute(pixels)
        # 8-bit pixels have at most 256 results per channel: compute these by the same steps and look them up.
        levels = np.arange(256, dtype=np.uint8).reshape(1, 256, 1)
        table = self._compute(np.repeat(levels, len(pixels), axis=0))
        result = np.empty(pixels.shape, table.dtype)
        for channel, values in enumerate(table[:, :, 0]):
            # The loop takes strips, because `take` converts its indices to 64 bits. mode="clip" avoids a copy of `out`.
            for row in range(0, pixels.shape[1], ROWS):
                rows = slice(row, row + ROWS)
                np.take(values, pixels[channel, rows], out=result[channel, rows], mode="clip")
        return result

    def _compute(self, pixels: np.ndarray) -> np.ndarray:
        """Rescale and normalize (C, H, W), in the dtypes and the order of operations of Transformers."""
        if self.do_rescale:
            pixels = _rescale(pixels, self.rescale_factor)
        if self.do_normalize:
            dtype = pixels.dtype if pixels.dtype.kind == "f" else np.dtype(np.float32)
            mean, std = (np.array(value, dtype).reshape(-1, 1, 1) for value in (self.image_mean, self.image_std))
            # Rescaling made a new array, which may be overwritten; the caller's image may not.
            pixels = np.subtract(pixels, mean, out=pixels if self.do_rescale else None, dtype=dtype)
            pixels /= std
        return pixels

    def _resize(self, name: str, image: PIL.Image.Image | np.ndarray) -> np.ndarray:
        """Resize to (C, height, width) in 8 bits: uint8, or float32 for an image with values from 0 to 1."""
        size = self._pillow_size(name, image)
        if self.antialias is False:
            array = _pil_channels_first(image) if isinstance(image, PIL.Image.Image) else image
            levels, fractions = _eight_bits(name, array)
            resized = interpolate(levels, size[1], size[0])
            return _rescale(resized, 1 / 255) if fractions else resized
        resample = PIL.Image.Resampling(self.resample)
        if isinstance(image, PIL.Image.Image):
            return _pil_channels_first(image.resize(size, resample))
        levels, fractions = _eight_bits(name, image)
        if len(levels) <= 4:
            # As in Transformers, this is one PIL image: L, LA, RGB or RGBA. If it has two or four channels, Pillow
            # takes the last channel for alpha and weights the other channels by it.
            whole = PIL.Image.fromarray(levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, -1))
            resized = _pil_channels_first(whole.resize(size, resample))
        else:
            resized = np.stack([np.asarray(PIL.Image.fromarray(level).resize(size, resample)) for level in levels])
        return _rescale(resized, 1 / 255) if fractions else resized

    def _pillow_size(self, name: str, image: PIL.Image.Image | np.ndarray) -> tuple[int, int]:
        """Return the (width, height) to which an image is resized."""
        height, width = _height_width(image)
        try:
            height, width = output_size(self.size, height, width, self.size_divisor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return width, height

    def _finish_map(self, name: str, label_map: np.ndarray) -> np.ndarray:
        """Resize and renumber a map (H, W); return a new int64 array."""
        if self.do_resize:
            if label_map.dtype != np.uint8:
                low, high = int(label_map.min()), int(label_map.max())
                if low < -(2**31) or high >= 2**31:
                    raise ValueError(
                        f"{name} has labels from {low} to {high}, above the 32 bits that Pillow can resize"
                    )
                label_map = label_map.astype(np.int32)
            size = self._pillow_size(name, label_map)
            label_map = np.asarray(PIL.Image.fromarray(label_map).resize(size, PIL.Image.Resampling.NEAREST))
        labels = label_map.astype(np.int64)
        if self.do_reduce_labels:
            # As in Transformers, 255 stays. Renumbering after resizing gives the same result, and has fewer pixels to
            # renumber.
            labels[labels == 0] = 255
            labels -= 1
            labels[labels == 254] = 255
        return labels


def _find_options(source: str | os.PathLike[str], filename: str, options: HubOptions) -> Path:
    """Return the path of the file of options; raise OSError that names the place if there is none."""
    if Path(source).is_file():
        return Path(source)
    path = find_file(source, filename, options)
    if path is None:
        raise FileNotFoundError(
            f"{source} has no {filename}; UperNetImageProcessor() has the default values, and save_pretrained "
            "writes the file"
        )
    return path


def _checked_resample(resample: Any) -> int:
    """Return the number of one of Pillow's filters."""
    try:
        return int(PIL.Image.Resampling(resample))
    except ValueError:
        names = ", ".join(f"{filter.value} ({filter.name.lower()})" for filter in PIL.Image.Resampling)
        raise ValueError(f"resample is {shown(resample)}; Pillow's filters are {names}") from None


def _checked_statistic(name: str, value: Any) -> float | tuple[float, ...]:
    """Return a mean or a standard deviation as one float, or as a tuple of one float per channel."""
    result: float | tuple[float, ...]
    try:
        result = tuple(float(item) for item in value) if np.ndim(value) == 1 else float(value)
    except (OverflowError, TypeError, ValueError):
        result = ()
    if result == () or not np.all(np.isfinite(result)):
        raise ValueError(f"{name} is {shown(value)}; give one finite number per channel, or one for all")
    check_bounds({name: list(result) if isinstance(result, tuple) else [result]})
    return result


def _length(statistic: float | Sequence[float]) -> int | None:
    return None if isinstance(statistic, float) else len(statistic)


def _checked_overrides(caller: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return overrides under their current names, without those that do nothing; TypeError names an unknown one."""
    renamed = {"do_reduce_labels" if name == "reduce_labels" else name: value for name, value in overrides.items()}
    return _check_overrides(caller, renamed, (*OPTIONS, *MORE_OPTIONS))


def _check_overrides(caller: str, overrides: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Remove arguments that do nothing, and return the others; raise TypeError for one that is not known."""
    take_arguments(caller, overrides, HubOptions())
    for name in NO_EFFECT:
        overrides.pop(name, None)
    for name, reason in NO_STEP.items():
        if value := overrides.pop(name, None):
            raise TypeError(f"{caller} does not support {name}={value}: {reason}; leave it out")
    if unknown := sorted(overrides.keys() - set(known)):
        raise TypeError(f"unknown argument {listed(unknown)}; there are {', '.join((*OPTIONS, *MORE_OPTIONS))}")
    return overrides


def _checked_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    # `in` compares by ==, so that members of Transformers' TensorType and ChannelDimension are accepted too.
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; give one of {', '.join(map(repr, choices))}")
    return choices[choices.index(value)]


def _over_white(name: str, image: Image, layout: str | None) -> tuple[Image, str | None]:
    """Return an image over white, with its layout: grey arrays with three channels, and images without alpha."""
    if isinstance(image, (str, os.PathLike)):
        return image, layout
    if isinstance(image, PIL.Image.Image):
        if "A" not in image.getbands() and "transparency" not in image.info:
            return image, layout
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, image).convert("RGB"), layout
    array = _numpy(name, image)
    if layout == "channels_last" or (layout is None and array.shape[0] not in (1, 3, 4)):
        array = np.moveaxis(array, -1, 0)
    if len(array) == 1:
        array = np.repeat(array, 3, axis=0)
    elif len(array) == 4:
        whole = array.dtype.kind != "f"
        if not whole and (array.min() < 0 or array.max() > 1):
            raise ValueError(f"{name} has values outside 0 to 1, where alpha has no meaning; drop alpha, or scale it")
        most = 255 if whole else 1.0
        alpha = array[3:] / most
        blended = alpha * array[:3] + (1 - alpha) * most
        array = (np.round(blended) if whole else blended).astype(array.dtype)
    return array, "channels_first"


def _flat_list(name: str, images: Any, ndim: int) -> list[Any]:
    """Return all images of lists and batches as one list; raise TypeError if their kinds differ."""
    items = _flatten(name, images, ndim)
    if not items:
        raise ValueError(f"{name} is empty; give at least one")
    kinds = {_kind(item) for item in items}
    if len(kinds) > 1:
        raise TypeError(f"{name} mixes {' and '.join(sorted(kinds))}; give a list of one kind")
    return items


def _flatten(name: str, images: Any, ndim: int) -> list[Any]:
    if isinstance(images, (list, tuple)):
        return [item for image in images for item in _flatten(name, image, ndim)]
    if isinstance(images, (PIL.Image.Image, str, os.PathLike)):
        return [images]
    if not isinstance(images, (np.ndarray, torch.Tensor)):
        raise TypeError(f"{name} holds {type(images).__name__}; give PIL images, file names, numpy arrays or tensors")
    if images.ndim == ndim:
        return [images]
    if images.ndim == ndim + 1:
        return list(images)
    remedy = ""
    if images.ndim == 2:
        remedy = "; pass a grey image as PIL.Image.fromarray(array), or repeat it to 3 channels"
    raise ValueError(
        f"{name} holds an array of shape {tuple(images.shape)} where {ndim} dimensions are expected{remedy}"
    )


def _kind(image: Any) -> str:
    if isinstance(image, np.ndarray):
        return "numpy arrays"
    return "tensors" if isinstance(image, torch.Tensor) else "PIL images or files"


def _numpy(name: str, image: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return the numbers of an array, or of a tensor on any device, without an avoidable copy."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if image.dtype.kind not in "buif":
        raise TypeError(f"{name} has dtype {image.dtype}; give integers or floats")
    return image


def _pil_channels_first(image: PIL.Image.Image) -> np.ndarray:
    """Return the pixels of a PIL image as a view (C, H, W)."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _height_width(image: PIL.Image.Image | np.ndarray) -> tuple[int, ...]:
    return image.size[::-1] if isinstance(image, PIL.Image.Image) else image.shape[-2:]


def _rescale(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Multiply in float64 and round to float32, without a float64 array."""
    result = np.empty_like(pixels, dtype=np.float32)
    return np.multiply(pixels, factor, out=result, dtype=np.float64, casting="unsafe")


def _eight_bits(name: str, array: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return an image (C, H, W) as 8-bit levels, and True if its values were fractions of 1.

    The rule is Transformers': whole numbers are levels; other numbers must be from 0 to 1 and are truncated to 1/255.
    """
    if array.dtype == np.uint8:
        return array, False
    low, high = array.min(), array.max()
    whole = array.dtype.kind != "f" or all(np.allclose(channel, channel.astype(int)) for channel in array)
    limit = 255 if whole else 1
    if low < 0 or high > limit:
        raise ValueError(
            f"{name} has values from {low} to {high}; Pillow resizes whole levels from 0 to 255 and fractions from "
            "0 to 1 only: scale the image, or resize it yourself and pass do_resize=False"
        )
    return (array if whole else _rescale(array, 255)).astype(np.uint8), not whole


def _open_map(name: str, segmentation_map: Image) -> np.ndarray:
    """Return a segmentation map as whole numbers (H, W)."""
    if isinstance(segmentation_map, (str, os.PathLike)):
        try:
            return read_labels(segmentation_map)
        except ImageError as error:
            raise type(error)(f"{name}: {error}") from None
    if isinstance(segmentation_map, PIL.Image.Image) and segmentation_map.mode != "F":
        array = as_labels(segmentation_map, name)
    elif isinstance(segmentation_map, PIL.Image.Image):
        array = np.asarray(segmentation_map)  # whole numbers are accepted, as in Transformers
    else:
        array = _numpy(name, segmentation_map)
    if array.size == 0:
        raise ValueError(f"{name} is {format_size(array.shape)} (height x width): it has no pixels")
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and np.array_equal(array, np.floor(array))):
        raise ValueError(f"{name} holds fractions, NaN or infinite values; labels are whole numbers")
    return array


def _stack(key: str, arrays: list[np.ndarray]) -> np.ndarray:
    """Return arrays as one batch. The caller owns the arrays: a batch of one is a view."""
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(
            f"{key} differ in shape, {' and '.join(map(str, sorted(shapes)))}; resize them (do_resize=True), or pass "
            "return_tensors=None for a list"
        )
    return np.stack(arrays) if len(arrays) > 1 else arrays[0][None]
