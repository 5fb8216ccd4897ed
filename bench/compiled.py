"""Compiles every kernel in every configuration ahead of time, without the target GPUs: `python -m bench.compiled`.

The operations launch as on a GPU, on tensors without data (PyTorch's meta device) with the shapes of a 512 x 512 image.
A driver names the target GPU, and the launch stops after compilation. The compiled code is therefore the code that such
a GPU runs. The table goes to bench/results/compiled.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default so far; Triton 3.9 warns of a change

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.results import FOLDER
from fastuper_kernels.gpu import (
    conv_bn_relu,
    fold_norm,
    pyramid_pool,
    upsample_argmax,
    upsample_cross_entropy,
    upsampled_conv3x3,
)
from fastuper_kernels.gpu.configs import CONV_CONFIGS, GROUP_CONFIGS
from fastuper_kernels.gpu.resample import transposed

PATH = FOLDER / "compiled.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory available to a program.
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
GEMMS = ("conv_kernel", "products_kernel", "pool_kernel")


class Ahead:
    """A Triton driver that names a target GPU and needs no GPU."""

    def __init__(self, name: str):
        self.name, self.target = name, TARGETS[name]

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[tuple[str, Any]]]:
    """Compile launches for a target instead of running them; yields the list of (kernel name, compiled kernel)."""
    found: list[tuple[str, Any]] = []
    run, before = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__, compiled))
        return compiled

    JITFunction.run = compile_only
    driver.set_active(Ahead(target))
    try:
        yield found
    finally:
        JITFunction.run = run
        driver._active = before  # `reset_active` looks for a GPU


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation in one configuration.

    Args:
        operation: its name in the table.
        configuration: as text, for the table.
        launch: launches the operation's kernels for a dtype.
        takes: (target, dtype) -> whether the configuration supports them.
    """

    operation: str
    configuration: str
    launch: Callable[[torch.dtype], Any]
    takes: Callable[[str, torch.dtype], bool] = lambda target, dtype: True


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor without data; tensors of four dimensions are channels_last."""
    tensor = torch.empty(*shape, dtype=dtype, device="meta")
    return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def _conv(size: int, k: int, channels: int, after: str, config: Any) -> Callable[[torch.dtype], Any]:
    def launch(dtype: torch.dtype) -> Any:
        x, weight = meta(1, channels, size, size, dtype=dtype), meta(512, channels, k, k, dtype=dtype)
        vector = meta(512, dtype=torch.float32)
        addend = meta(1, 512, size, size, dtype=dtype) if after == "addend" else None
        upsampled = meta(1, 512, size // 2, size // 2, dtype=dtype) if after == "upsampled" else None
        conv_bn_relu.conv(x, weight, vector, vector, addend, upsampled, True, config)

    return launch


def _fits(config: Any, after: str) -> Callable[[str, torch.dtype], bool]:
    def fits(target: str, dtype: torch.dtype) -> bool:
        return (config.way != "tma" or target == "sm_90") and config.fits(dtype, after == "upsampled")

    return fits


def _group(sizes: tuple[int, ...], taps: int, config: Any) -> Callable[[torch.dtype], Any]:
    def launch(dtype: torch.dtype) -> Any:
        levels = [meta(1, size * size, 512, dtype=dtype) for size in sizes]
        weights = [meta(512, taps, 512, dtype=dtype) for _ in sizes]
        vectors = meta(len(sizes), 512, dtype=torch.float32)
        scale = shift = vectors if taps == 1 else None
        upsampled_conv3x3.products_of(levels, weights, scale, shift, relu=taps == 1, config=config)

    return launch


def cases() -> list[Case]:
    """Return every operation in every configuration, forward and backward."""
    found = []
    for config in CONV_CONFIGS:
        text = " ".join(f"{key}={value}" for key, value in dataclasses.asdict(config).items())
        for k, channels, after in ((3, 512, "addend"), (1, 384, "upsampled"), (1, 96, "upsampled")):
            size = 128 if config.split == 1 else 32
            found.append(
                Case(
                    f"conv{k}x{k} of {channels}, {after}",
                    text,
                    _conv(size, k, channels, after, config),
                    _fits(config, after),
                )
            )
    for group in GROUP_CONFIGS:
        text = " ".join(f"{key}={value}" for key, value in dataclasses.asdict(group).items())
        found.append(Case("products of the taps", text, _group((64, 32, 16), 9, group)))
        found.append(Case("branches of the pyramid", text, _group((1, 2, 3, 6), 1, group)))

    def sum_of_taps(dtype: torch.dtype) -> Any:
        sizes = [(64, 64), (32, 32), (16, 16)]
        upsampled_conv3x3.gather(
            [meta(1, h * w, 9, 512, dtype=dtype) for h, w in sizes], sizes, meta(1, 128, 128, 512, dtype=dtype)
        )

    def back(taps: int) -> Callable[[torch.dtype], Any]:
        return lambda dtype: transposed(torch.empty(1, 128, 128, 512, dtype=dtype, device="meta"), (64, 64), taps)

    def pool(channels: int, pooling: str) -> Callable[[torch.dtype], Any]:
        return lambda dtype: pyramid_pool.pool(meta(1, channels, 16, 16, dtype=dtype), [1, 2, 3, 6], pooling)

    def pool_back(channels: int, pooling: str) -> Callable[[torch.dtype], Any]:
        return lambda dtype: pyramid_pool.pool_backward(
            meta(1, 50, channels, dtype=dtype), [1, 2, 3, 6], pooling, 16, 16
        )

    def fold(dtype: torch.dtype) -> Any:
        fold_norm.fold(*(meta(512, dtype=dtype) for _ in range(4)), 1e-5)

    def argmax(heights: list[int], widths: list[int]) -> Callable[[torch.dtype], Any]:
        return lambda dtype: upsample_argmax.argmax(meta(1, 150, 128, 128, dtype=dtype), heights, widths, torch.int64)

    def in_slices(dtype: torch.dtype) -> Any:
        groups = torch.empty(1, 512, 512, dtype=torch.int64, device="meta")
        logits = meta(1, 427, 128, 128, dtype=dtype)
        upsample_argmax.argmax_in_slices(logits, [512], [512], groups, [0, 2, 26], [2, 26, 41], torch.int64)

    def loss(heights: list[int], widths: list[int], weighted: bool) -> Callable[[torch.dtype], Any]:
        def launch(dtype: torch.dtype) -> Any:
            logits = meta(1, 150, 128, 128, dtype=dtype)
            labels = torch.empty(1, heights[-1], widths[-1], dtype=torch.int64, device="meta")
            weight = meta(150, dtype=torch.float32) if weighted else None
            how = (heights, widths, 255, 0.1 if weighted else 0.0)
            losses, logs = upsample_cross_entropy.forward(logits, labels, weight, *how)
            upsample_cross_entropy.backward(losses, logits, labels, weight, logs, *how)

        return launch

    found += [
        Case("sum of the taps", "", sum_of_taps),
        Case("sum of the taps, backward", "", back(3)),
        Case("upsample_add, backward", "", back(1)),
        Case("pyramid_pool", "", pool(768, "adaptive")),
        Case("pyramid_pool, backward", "", pool_back(768, "adaptive")),
        Case("pyramid_pool, precise RoI", "", pool(2048, "precise_roi")),
        Case("pyramid_pool, precise RoI, backward", "", pool_back(2048, "precise_roi")),
        Case("fold_norm", "", fold),
        Case("upsample_argmax", "", argmax([512], [512])),
        Case("upsample_argmax, two sizes", "", argmax([512, 683], [512, 1024])),
        Case("upsample_argmax, in slices", "", in_slices),
        Case("upsample_cross_entropy", "", loss([512], [512], False)),
        Case("upsample_cross_entropy, two sizes", "", loss([512, 683], [512, 1024], False)),
        Case("upsample_cross_entropy, weights and smoothing", "", loss([512], [512], True)),
    ]
    return found


def is_ieee(row: dict[str, Any]) -> bool:
    """Return True if a kernel multiplies in full float32, which tensor cores do not support."""
    return row["kernel"] == "pool_kernel" and (row["dtype"] == "fp32" or "precise RoI" in row["operation"])


def row_of(target: str, kernel: str, case: Case, dtype: str, compiled: Any) -> dict[str, Any]:
    """Return a kernel's row: registers, spilled bytes, shared memory, and the instructions in use."""
    row = {"kernel": kernel, "operation": case.operation, "configuration": case.configuration, "dtype": dtype}
    row |= {"target": target, "triton": triton.__version__}
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        row |= {"registers": _number(text, r"\.vgpr_count:\s*(\d+)")}
        row |= {"spill_bytes": 4 * _number(text, r"\.vgpr_spill_count:\s*(\d+)")}
        row |= {"shared": compiled.metadata.shared, "mfma": "v_mfma" in text}
        return row
    usage = _resource_usage(compiled.asm["cubin"])
    text = compiled.asm["ptx"]
    row |= {"registers": _number(usage, r"REG:(\d+)"), "spill_bytes": _number(usage, r"STACK:(\d+)")}
    row |= {"shared": compiled.metadata.shared}
    row |= {"wgmma": "wgmma.mma_async" in text, "tma": "cp.async.bulk.tensor" in text}
    return row


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found[1])


def _resource_usage(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def rows(
    targets: list[str], dtypes: list[str], wanted: Callable[[Case], bool] = lambda case: True
) -> Iterator[dict[str, Any]]:
    """Compile the wanted cases for the targets and dtypes, and yield a row for each kernel."""
    for target in targets:
        for case in filter(wanted, cases()):
            for dtype in dtypes:
                if not case.takes(target, DTYPES[dtype]):
                    continue
                with compiling(target) as found:
                    case.launch(DTYPES[dtype])
                for kernel, compiled in found:
                    yield row_of(target, kernel, case, dtype, compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="separated by commas")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="separated by commas")
    parser.add_argument("--show", action="store_true", help="print the rows without writing the file")
    arguments = parser.parse_args()
    found = []
    for row in rows(arguments.targets.split(","), arguments.dtypes.split(",")):
        found.append(row)
        print(*row.values(), sep=" | ", flush=True)
    if not arguments.show:
        PATH.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
