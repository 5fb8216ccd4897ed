"""`python -m fastuper_kernels.tune`: measure the convolutions' configurations on this GPU; `--show` says what decides.

What is measured goes to `$FASTUPER_CACHE/tuned.json`, or `~/.cache/fastuper/tuned.json`, under the GPU's name, and is
taken from then on. `--output FILE` writes it elsewhere: so are the configurations made that the package brings.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastuper_kernels.dispatch.choices import may_measure, replace_json, table
from fastuper_kernels.ops.conv_bn_relu import CONV


class Layer(NamedTuple):
    """A convolution with BatchNorm and ReLU on x (B, C, H, W), and whether a coarser map is added to it."""

    shape: tuple[int, int, int, int]
    channels_out: int
    taps: int
    upsampled: bool


# Of a UPerNet with a Tiny backbone: (stride, channels, channels of the output, taps, whether a coarser map is added).
LAYERS = (
    (32, 768, 512, 9, False),
    (16, 384, 512, 1, True),
    (8, 192, 512, 1, True),
    (4, 96, 512, 1, True),
    (16, 512, 512, 9, False),
    (8, 512, 512, 9, False),
    (4, 512, 512, 9, False),
    (4, 512, 150, 1, False),
)


def layers(sizes: list[int], batches: list[int]) -> Iterator[Layer]:
    """Yield the head's convolutions."""
    for batch in batches:
        for size in sizes:
            for stride, channels, channels_out, taps, upsampled in LAYERS:
                yield Layer((batch, channels, size // stride, size // stride), channels_out, taps, upsampled)


def measure(layer: Layer, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fastest configuration of a convolution, its milliseconds and cuDNN's."""
    from triton.testing import do_bench

    from fastuper_kernels.gpu.configs import CONV_CONFIGS, ConvConfig, as_json, has_tma
    from fastuper_kernels.gpu.conv_bn_relu import conv

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype, memory_format=torch.channels_last)

    (batch, channels, height, width), channels_out = layer.shape, layer.channels_out
    k = 3 if layer.taps == 9 else 1
    x, weight = tensor(*layer.shape), tensor(channels_out, channels, k, k)
    coarser = tensor(batch, channels_out, -(-height // 2), -(-width // 2)) if layer.upsampled else None
    scale, shift = torch.randn(2, channels_out, device="cuda").unbind()
    times = {}
    for config in (ConvConfig("cudnn"), *CONV_CONFIGS):
        if config.way != "cudnn" and not config.fits(dtype, layer.upsampled):
            continue
        if (config.way == "tma" and not has_tma(x.device)) or not config.fits_in(x.device):
            continue
        try:
            milliseconds = do_bench(
                lambda config=config: conv(x, weight, scale, shift, None, coarser, True, config), return_mode="median"
            )
        except Exception as error:  # a configuration that this GPU cannot run is not one to take
            print(f"  {config}: {type(error).__name__}")
            continue
        times[config] = round(float(milliseconds), 5)
    best = min(times, key=times.__getitem__)
    return {"config": as_json(best), "milliseconds": times[best], "cudnn": times.get(ConvConfig("cudnn"))}


def write(path: Path, device: str, entries: dict[str, Any]) -> None:
    """Add what was measured on a device to a file."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found[device] = {**found.get(device, {}), **entries}
    replace_json(path, found)


def show() -> Iterator[str]:
    """Yield what decides for each shape on this GPU, or that there is none; then what was measured beside cuDNN."""
    from fastuper_kernels.gpu.configs import conv_key, heuristic, tuned

    if not torch.cuda.is_available():
        yield "no GPU here: the kernels run in Triton's interpreter alone, with a heuristic's configurations"
        yield from table([CONV])
        return
    device = torch.device("cuda", torch.cuda.current_device())
    yield torch.cuda.get_device_name(device)
    found = tuned(device, may_measure())
    for layer in layers([512, 1024], [1, 8, 16]):
        x = torch.empty((), dtype=torch.bfloat16, device=device).expand(layer.shape)
        key = conv_key(x, *layer[1:])
        decides = f"measured: {found[key]}" if key in found else f"heuristic: {heuristic(x, *layer[1:])}"
        yield f"{key}: {decides}"
    yield from table([CONV])


def main() -> None:
    """Run the command."""
    from fastuper_kernels.gpu.configs import conv_key, user_file

    parser = argparse.ArgumentParser(prog="python -m fastuper_kernels.tune", description=__doc__)
    parser.add_argument("--show", action="store_true", help="print what decides here, and measure nothing")
    parser.add_argument("--sizes", default="512", help="image sizes, separated by commas")
    parser.add_argument("--batches", default="1,8,16", help="batch sizes")
    parser.add_argument("--dtypes", default="bfloat16", help="dtypes")
    parser.add_argument("--output", type=Path, help="the file to write")
    arguments = parser.parse_args()
    if arguments.show:
        print(*show(), sep="\n")
        return
    if not torch.cuda.is_available():
        parser.error("there is no GPU here to measure on")
    path = arguments.output or user_file()
    if path is None:
        parser.error("there is no home to keep the result in: give --output FILE, or set FASTUPER_CACHE")
    sizes, batches = ([int(n) for n in text.split(",")] for text in (arguments.sizes, arguments.batches))
    entries = {}
    for name in arguments.dtypes.split(","):
        dtype = getattr(torch, name)
        for layer in layers(sizes, batches):
            key = conv_key(torch.empty(layer.shape, dtype=dtype, device="meta"), *layer[1:])
            entries[key] = measure(layer, dtype)
            print(key, entries[key], flush=True)
    write(path, torch.cuda.get_device_name(), entries)


if __name__ == "__main__":
    main()
