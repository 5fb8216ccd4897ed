"""Which configuration of a kernel runs: forced, or measured on this GPU, or else a heuristic's.

What was tuned on a GPU that was really used is in tuned.json, under the device's name; what `python -m
fastuper_kernels.tune` measures is in the user's cache (see `fastuper_kernels.dispatch.choices`). For every other
device and shape a heuristic picks one, labelled as such by `python -m fastuper_kernels.tune --show`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastuper_kernels.dispatch.choices import cache_file, forced, may_measure
from fastuper_kernels.ops.conv_bn_relu import CONV

SHIPPED = Path(__file__).parent / "tuned.json"


@dataclass(frozen=True)
class ConvConfig:
    """How `conv_bn_relu` runs.

    Args:
        way: "tma" (tensor descriptors), "pointers", or "cudnn" with its epilogue in a kernel of its own.
        rows: of a tile of pixels: a box of an image for 3x3 with TMA, and else `rows * columns` in a row.
        columns: see there.
        channels: output channels of a tile.
        depth: bytes of input channels of a step.
        split: into how many parts the inner dimension goes.
        warps: of a program.
        stages: of the loads' pipeline.
        persistent: whether there are as many programs as multiprocessors, which take tiles in turn.
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
        """Return the input channels of a step."""
        return self.depth // dtype.itemsize

    def fits(self, dtype: torch.dtype, upsampled: bool) -> bool:
        """Return whether a tile, and what is added to it, stay in registers (`bench/results/compiled.json`)."""
        if self.split > 1:  # the epilogue is another kernel's
            return True
        limit = 4096 // (dtype.itemsize // 2) // (1 + upsampled * (1 if self.way == "tma" else 3))
        return self.rows * self.columns * self.channels // self.warps <= limit

    def fits_in(self, device: torch.device) -> bool:
        """Return whether the steps that are loaded ahead fit in a multiprocessor's shared memory."""
        return _fit_in(self, self.rows * self.columns, device)

    def steps_of(self, channels: int, taps: int, dtype: torch.dtype) -> int:
        """Return the steps that this inner dimension takes."""
        return taps * -(-channels // self.depth_of(dtype))

    def split_of(self, channels: int, taps: int, dtype: torch.dtype) -> int:
        """Return into how many equal parts those steps go: `split`, or the next fewer."""
        steps = self.steps_of(channels, taps, dtype)
        return max(n for n in range(1, self.split + 1) if steps % n == 0)

    def stages_of(self, channels: int, taps: int, dtype: torch.dtype) -> int:
        """Return `stages`, or fewer where there are not as many steps to load ahead."""
        steps = self.steps_of(channels, taps, dtype) // self.split_of(channels, taps, dtype)
        return max(2, min(self.stages, steps))

    def box_of(self, taps: int) -> tuple[int, int]:
        """Return rows and columns of a tile's box of pixels."""
        return (self.rows, self.columns) if self.way == "tma" and taps == 9 else (1, self.rows * self.columns)

    def tiles_of(self, batch: int, height: int, width: int, channels: int, taps: int) -> int:
        """Return how many tiles there are."""
        rows, columns = self.box_of(taps)
        boxes = batch * -(-height // rows) * -(-width // columns)
        return (boxes if rows > 1 else -(-batch * height * width // columns)) * -(-channels // self.channels)


@dataclass(frozen=True)
class GroupConfig:
    """How the products of several maps' channels run; see `ConvConfig`."""

    rows: int
    channels: int
    depth: int = 128
    warps: int = 4
    stages: int = 4

    def depth_of(self, dtype: torch.dtype) -> int:
        """Return the input channels of a step."""
        return self.depth // dtype.itemsize

    def fits_in(self, device: torch.device) -> bool:
        """Return whether the steps that are loaded ahead fit in a multiprocessor's shared memory."""
        return _fit_in(self, self.rows, device)


def _fit_in(config: ConvConfig | GroupConfig, pixels: int, device: torch.device) -> bool:
    return config.stages * (pixels + config.channels) * config.depth < shared_memory(device)


# What the tuner tries, in the heuristic's order, large tiles first; all of them are compiled ahead of time for every
# target that can take them.
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

SPLIT_STEPS = 16  # of each part of a split inner dimension, at least
NEARLY = 0.9  # of the multiprocessors: a few that wait cost less than smaller tiles


def conv_key(x: torch.Tensor, channels_out: int, taps: int, upsampled: bool) -> str:
    """Return the name under which a convolution's configuration is kept."""
    shape, kernel = "x".join(map(str, x.shape)), "3x3" if taps == 9 else "1x1"
    added = ", a coarser map added" if upsampled else ""
    return f"{kernel} {shape} -> {channels_out} {str(x.dtype)[len('torch.') :]}{added}"


def conv_config(
    x: torch.Tensor, channels_out: int, taps: int, upsampled: bool, candidates: Any = None, after: str = ""
) -> ConvConfig:
    """Return the configuration for x (B, C, H, W) and a weight (channels_out, C, k, k) of so many taps.

    Args:
        x: see there.
        channels_out: see there.
        taps: see there.
        upsampled: whether a coarser map is added in the epilogue.
        candidates: makes, for a configuration, the functions {"triton": ..., "cudnn": ...} to be measured.
        after: what follows the convolution, in words: for the name of that measurement.
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


def _time_each(functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the seconds that each function takes on the GPU: what the host needs to launch it is hidden."""
    from triton.testing import do_bench

    median = functools.partial(do_bench, warmup=5, rep=20, return_mode="median")
    return {name: float(median(function)) / 1e3 for name, function in functions.items()}


def heuristic(x: torch.Tensor, channels_out: int, taps: int, upsampled: bool, must: bool = False) -> ConvConfig:
    """Return a configuration without a measurement: the first that nearly fills the GPU, or else the most programs.

    Where the kernel is a `must`, cuDNN is not preferred to it. The inner dimension is split only where each part is
    long: adding up the parts costs as much as some steps.
    """
    batch, channels, height, width = x.shape
    if x.is_cuda and x.dtype == torch.float32 and precision(x.dtype) == "ieee":
        # No tensor cores: PyTorch's own way has nothing to lose, and large tiles would not stay in registers.
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
    """Return a configuration for operands that no descriptor can say: slices, or rows, of odd numbers of bytes."""
    return next(
        (
            config
            for config in CONV_CONFIGS
            if config.way == "pointers" and config.fits(x.dtype, upsampled) and config.fits_in(x.device)
        ),
        ConvConfig("cudnn"),
    )


def group_config(x: torch.Tensor, pixels: int) -> GroupConfig:
    """Return the configuration for maps of at most so many pixels."""
    fitting = (config for config in GROUP_CONFIGS if config.fits_in(x.device))
    return next((config for config in fitting if pixels >= 32 * config.rows), GROUP_CONFIGS[-1])


def precision(dtype: torch.dtype) -> str:
    """Return how the tensor cores may take float32: as in cuDNN's convolutions, which these kernels stand for."""
    if dtype != torch.float32:
        return "tf32"  # says nothing about other types
    backends: Any = torch.backends
    settings = (backends.cudnn.conv.fp32_precision, backends.cudnn.fp32_precision, backends.fp32_precision)
    said = next((setting for setting in settings if setting != "none"), "ieee")  # "none" leaves it to the next one
    return "tf32" if said == "tf32" else "ieee"


@functools.cache
def has_tma(device: torch.device) -> bool:
    """Return whether tensor descriptors are moved by hardware."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs run at once, at least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes that a program can have of a multiprocessor's fast memory; without a GPU, a Hopper's."""
    if device.type != "cuda":
        return 232448
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 65536)  # an AMD GPU's says nothing: it has 64 KB


def user_file() -> Path | None:
    """Return where this user's tuned configurations are kept; None where there is no home."""
    path = cache_file()
    return None if path is None else path.with_name("tuned.json")


@functools.cache
def tuned(device: torch.device, by_user: bool) -> Mapping[str, ConvConfig]:
    """Return the configurations that were measured on GPUs of this name, the user's before those of the package.

    Args:
        device: the GPU.
        by_user: whether the user's count: not where ranks have to agree, whose users' files may not.
    """
    if device.type != "cuda":
        return {}
    found: dict[str, ConvConfig] = {}
    for path in (SHIPPED, user_file() if by_user else None):
        # A file of another version counts for nothing.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            if path is not None:
                entries = json.loads(path.read_text(encoding="utf-8"))[torch.cuda.get_device_name(device)]
                found.update({key: ConvConfig(**entry["config"]) for key, entry in entries.items()})
    return found


def as_json(config: ConvConfig) -> dict[str, Any]:
    """Return what `tuned` reads."""
    return asdict(config)
