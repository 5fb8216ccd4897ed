"""Configurations of the kernels: forced, or measured on this GPU, or else picked by a heuristic.

The package's measured configurations are in `tuned.json` beside this file, under the GPU's name. The user's own, from
`python -m fastuper_kernels.tune`, are in `tuned.json` of the cache folder (see `fastuper_kernels.dispatch.files`). For
every other GPU and shape a heuristic picks a configuration. `python -m fastuper_kernels.tune --show` prints the
configuration of each shape.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastuper_kernels.dispatch.choices import CONV, forced, may_measure
from fastuper_kernels.dispatch.files import cache_folder, read_json
from fastuper_kernels.dispatch.measuring import ROUNDS

SHIPPED = Path(__file__).parent / "tuned.json"


@dataclass(frozen=True)
class ConvConfig:
    """The configuration of `conv_bn_relu`.

    Args:
        way: "tma" (tensor descriptors), "pointers", or "cudnn" with the epilogue in a second kernel.
        rows: rows of a tile's pixels. With TMA and 3x3 a tile is a box (rows, columns) of an image. Otherwise it is
            `rows * columns` consecutive pixels of the batch.
        columns: columns of a tile's pixels.
        channels: output channels of a tile.
        depth: bytes of input channels per step of the inner loop.
        split: the number of parts of the inner dimension; with more than one, a second kernel adds up the parts.
        warps: warps of a program.
        stages: stages of the pipeline of loads.
        persistent: True for one program per multiprocessor, each of which computes several tiles.
    """

    way: str
    rows: int = 8
    columns: int = 16
    channels: int = 128
    depth: int = 128
    split: int = 1
    warps: int = 8
    stages: int = 3
    persistent: bool = False

    def depth_of(self, dtype: torch.dtype) -> int:
        """Return the input channels per step of the inner loop."""
        return self.depth // dtype.itemsize

    def fits(self, dtype: torch.dtype, upsampled: bool) -> bool:
        """Return True if a tile and its epilogue stay in registers (source: `bench/results/compiled.json`)."""
        if self.split > 1:  # the second kernel has the epilogue
            return True
        limit = 4096 // (dtype.itemsize // 2) // (1 + upsampled * (1 if self.way == "tma" else 3))
        return self.rows * self.columns * self.channels // self.warps <= limit

    def fits_in(self, device: torch.device) -> bool:
        """Return True if the pipeline's stages fit in a multiprocessor's shared memory."""
        return _fit_in(self, self.rows * self.columns, device)

    def steps_of(self, channels: int, taps: int, dtype: torch.dtype) -> int:
        """Return the number of steps of the inner loop for all taps and input channels."""
        return taps * -(-channels // self.depth_of(dtype))

    def split_of(self, channels: int, taps: int, dtype: torch.dtype) -> int:
        """Return the number of equal parts of the inner loop: the largest divisor of its steps up to `split`."""
        steps = self.steps_of(channels, taps, dtype)
        return max(n for n in range(1, self.split + 1) if steps % n == 0)

    def stages_of(self, channels: int, taps: int, dtype: torch.dtype) -> int:
        """Return the stages of the pipeline: `stages`, or the number of steps if that is smaller, but 2 at least."""
        steps = self.steps_of(channels, taps, dtype) // self.split_of(channels, taps, dtype)
        return max(2, min(self.stages, steps))

    def box_of(self, taps: int) -> tuple[int, int]:
        """Return (rows, columns) of a tile's box of pixels."""
        return (self.rows, self.columns) if self.way == "tma" and taps == 9 else (1, self.rows * self.columns)

    def tiles_of(self, batch: int, height: int, width: int, channels: int, taps: int) -> int:
        """Return the number of tiles of an output (batch, height, width, channels)."""
        rows, columns = self.box_of(taps)
        boxes = batch * -(-height // rows) * -(-width // columns)
        return (boxes if rows > 1 else -(-batch * height * width // columns)) * -(-channels // self.channels)


@dataclass(frozen=True)
class GroupConfig:
    """The configuration of `products_kernel`, the grouped GEMM over several maps.

    Args:
        rows: positions of a tile.
        channels: output channels of a tile.
        depth: bytes of input channels per step of the inner loop.
        warps: warps of a program.
        stages: stages of the pipeline of loads.
    """

    rows: int
    channels: int
    depth: int = 128
    warps: int = 4
    stages: int = 4

    def depth_of(self, dtype: torch.dtype) -> int:
        """Return the input channels per step of the inner loop."""
        return self.depth // dtype.itemsize

    def fits_in(self, device: torch.device) -> bool:
        """Return True if the pipeline's stages fit in a multiprocessor's shared memory."""
        return _fit_in(self, self.rows, device)


def _fit_in(config: ConvConfig | GroupConfig, pixels: int, device: torch.device) -> bool:
    return config.stages * (pixels + config.channels) * config.depth < shared_memory(device)


# The configurations that the tuner measures, in the heuristic's order, large tiles first. `make compiled` compiles all
# of them ahead of time, for every target that can run them.
CONV_CONFIGS = (
    ConvConfig("tma", 16, 16, 128, warps=8, stages=3),
    ConvConfig("tma", 16, 16, 128, warps=8, stages=4),
    ConvConfig("tma", 16, 16, 128, warps=8, stages=3, persistent=True),
    ConvConfig("tma", 8, 16, 128, warps=8, stages=4),
    ConvConfig("tma", 8, 16, 128, warps=4, stages=4),
    ConvConfig("tma", 8, 16, 128, split=4, warps=4, stages=4),
    ConvConfig("tma", 8, 8, 128, split=8, warps=4, stages=4),
    ConvConfig("tma", 8, 8, 128, warps=4, stages=4),
    ConvConfig("tma", 8, 8, 64, warps=4, stages=4),
    ConvConfig("pointers", 8, 16, 128, warps=8, stages=3),
    ConvConfig("pointers", 8, 16, 64, warps=4, stages=3),
    ConvConfig("pointers", 8, 8, 64, warps=4, stages=3),
    ConvConfig("pointers", 8, 8, 64, split=4, warps=4, stages=3),
    ConvConfig("pointers", 4, 8, 64, split=8, warps=4, stages=3),
)
GROUP_CONFIGS = (
    GroupConfig(128, 128, warps=8, stages=3),
    GroupConfig(64, 64, warps=4, stages=4),
    GroupConfig(16, 64, warps=4, stages=4),
)

SPLIT_STEPS = 16  # the least steps of a part of a split inner dimension
NEARLY = 0.9  # of the multiprocessors: a few idle multiprocessors cost less than smaller tiles


def conv_key(x: torch.Tensor, channels_out: int, taps: int, upsampled: bool) -> str:
    """Return the key of a convolution's configuration in the tuned files."""
    shape, kernel = "x".join(map(str, x.shape)), "3x3" if taps == 9 else "1x1"
    added = ", a coarser map added" if upsampled else ""
    return f"{kernel} {shape} -> {channels_out} {str(x.dtype)[len('torch.') :]}{added}"


def conv_config(
    x: torch.Tensor, channels_out: int, taps: int, upsampled: bool, candidates: Any = None, after: str = ""
) -> ConvConfig:
    """Return the configuration of a convolution.

    Args:
        x: (B, C, H, W).
        channels_out: output channels.
        taps: 1 or 9, for a kernel of 1x1 or 3x3.
        upsampled: True if the epilogue adds a coarser map.
        candidates: makes, for a configuration, the functions {"triton": ..., "cudnn": ...} to measure; None to measure
            nothing.
        after: the epilogue in words, for the key of the measurement.
    """
    key, way = conv_key(x, channels_out, taps, upsampled), forced().get(CONV.name)
    found = tuned(x.device, may_measure()).get(key)
    if way is None and found is not None:
        return found
    config = heuristic(x, channels_out, taps, upsampled, must=way == "triton")
    if x.is_cuda and candidates is not None and config.way != "cudnn":
        name = torch.cuda.get_device_name(x.device)
        way = CONV(f"{key}, {after} on {name}", functools.partial(candidates, config), _time_each)
    return ConvConfig("cudnn") if way == "cudnn" else config


def _time_each(functions: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Return seconds of each function on the GPU's clock, without the host's time for launches: a median a turn."""
    from triton.testing import do_bench

    median = functools.partial(do_bench, warmup=1, rep=2, return_mode="median")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            times[name].append(float(median(function)) / 1e3)
    return times


def heuristic(x: torch.Tensor, channels_out: int, taps: int, upsampled: bool, must: bool = False) -> ConvConfig:
    """Return a configuration without a measurement.

    It is the first that nearly fills the GPU, or else the configuration with the most programs. The inner dimension is
    split only into long parts: the addition of the parts costs as much as some steps.

    Args:
        x: (B, C, H, W).
        channels_out: output channels.
        taps: 1 or 9, for a kernel of 1x1 or 3x3.
        upsampled: True if the epilogue adds a coarser map.
        must: True if the Triton kernel is forced; cuDNN is then not preferred for IEEE float32.
    """
    batch, channels, height, width = x.shape
    if x.is_cuda and x.dtype == torch.float32 and precision(x.dtype) == "ieee":
        # Without tensor cores the kernel cannot be faster than cuDNN, and large tiles would not stay in registers.
        return CONV_CONFIGS[-1] if must else ConvConfig("cudnn")
    way = "tma" if has_tma(x.device) and channels * x.element_size() % 16 == 0 else "pointers"
    programs = {}
    for config in CONV_CONFIGS:
        split = config.split_of(channels, taps, x.dtype)
        long_enough = split == 1 or config.steps_of(channels, taps, x.dtype) // split >= SPLIT_STEPS
        if config.way != way or config.persistent or not long_enough or (config.split > 1 and split == 1):
            continue
        if config.fits(x.dtype, upsampled) and config.fits_in(x.device):
            programs[config] = config.tiles_of(batch, height, width, channels_out, taps) * split
    enough = NEARLY * multiprocessors(x.device)
    full = (config for config, count in programs.items() if count >= enough)
    return next(full, max(programs, key=programs.__getitem__, default=ConvConfig("cudnn")))


def pointers_config(x: torch.Tensor, upsampled: bool) -> ConvConfig:
    """Return a configuration without TMA, for operands whose strides are no multiple of 16 bytes."""
    return next(
        (
            config
            for config in CONV_CONFIGS
            if config.way == "pointers" and config.fits(x.dtype, upsampled) and config.fits_in(x.device)
        ),
        ConvConfig("cudnn"),
    )


def group_config(x: torch.Tensor, pixels: int) -> GroupConfig:
    """Return the configuration of `products_kernel` for maps like x, the largest of `pixels` pixels over the batch."""
    fitting = (config for config in GROUP_CONFIGS if config.fits_in(x.device))
    return next((config for config in fitting if pixels >= 32 * config.rows), GROUP_CONFIGS[-1])


def precision(dtype: torch.dtype) -> str:
    """Return the precision of float32 products, "tf32" or "ieee": PyTorch's setting for cuDNN's convolutions."""
    if dtype != torch.float32:
        return "tf32"  # without effect on other dtypes
    backends: Any = torch.backends
    settings = (backends.cudnn.conv.fp32_precision, backends.cudnn.fp32_precision, backends.fp32_precision)
    setting = next((setting for setting in settings if setting != "none"), "ieee")  # "none" inherits the next setting
    return "tf32" if setting == "tf32" else "ieee"


@functools.cache
def has_tma(device: torch.device) -> bool:
    """Return True if the GPU moves boxes of tensors by hardware (TMA): Hopper and later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors, the least number of programs that run at once; without a GPU, 4."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program can use; without a GPU, the bytes of a Hopper."""
    if device.type != "cuda":
        return 232448
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 65536)  # AMD GPUs lack the property, and have 64 KB


def user_file() -> Path | None:
    """Return the file of this user's tuned configurations; None if the user has no home folder."""
    folder = cache_folder()
    return None if folder is None else folder / "tuned.json"


@functools.cache
def tuned(device: torch.device, by_user: bool) -> Mapping[str, ConvConfig]:
    """Return {key: configuration} as measured on GPUs of this name; the user's configurations replace the package's.

    Args:
        device: the GPU.
        by_user: True to read the user's file. False on several ranks, which have to agree: their files may differ.
    """
    if device.type != "cuda":
        return {}
    found: dict[str, ConvConfig] = {}
    for path in (SHIPPED, user_file() if by_user else None):
        # A file of another format is ignored.
        with contextlib.suppress(TypeError, KeyError, AttributeError):
            entries = read_json(path)[torch.cuda.get_device_name(device)]
            found.update({key: ConvConfig(**entry["config"]) for key, entry in entries.items()})
    return found


def as_json(config: ConvConfig) -> dict[str, Any]:
    """Return a configuration as `tuned` reads it."""
    return asdict(config)
