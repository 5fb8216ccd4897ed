"""`python -m fastuper_kernels.tune`: measure the configurations of the convolutions on this GPU.

The fastest configuration of each shape goes to `tuned.json` in the cache folder (`$FASTUPER_CACHE`, or the user's own;
Linux: `~/.cache/fastuper`), under the GPU's name. From then on the convolutions run with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastuper_kernels.dispatch.choices import CONV, may_measure, rows
from fastuper_kernels.dispatch.choices import show as show_choices
from fastuper_kernels.dispatch.files import read_json, replace_json
from fastuper_kernels.dispatch.terminal import print_table

NO_GPU = "no GPU here: the kernels run only in Triton's interpreter, with the heuristic's configurations"


class Layer(NamedTuple):
    """A convolution with BatchNorm and ReLU on x (B, C, H, W).

    Args:
        shape: (B, C, H, W) of x.
        channels_out: output channels.
        taps: 1 or 9, for a kernel of 1x1 or 3x3.
        upsampled: True if a coarser map is added.
    """

    shape: tuple[int, int, int, int]
    channels_out: int
    taps: int
    upsampled: bool


# The convolutions of a UPerNet with a Tiny backbone: (stride, channels, channels_out, taps, upsampled).
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
    """Yield the head's convolutions, for each batch size and image size."""
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
        except Exception as error:  # this GPU cannot run the configuration
            print(f"  {config}: {type(error).__name__}")
            continue
        times[config] = round(float(milliseconds), 5)
    best = min(times, key=times.__getitem__)
    return {"config": as_json(best), "milliseconds": times[best], "cudnn": times.get(ConvConfig("cudnn"))}


def write(path: Path, device: str, entries: dict[str, Any]) -> None:
    """Add measured entries {key: result} of a device to a file; entries of other keys and devices stay."""
    found = read_json(path)
    older = found.get(device)
    found[device] = {**(older if isinstance(older, dict) else {}), **entries}
    replace_json(path, found)


def configurations() -> Iterator[tuple[str, str, str]]:
    """Yield (convolution, "measured" or "heuristic", configuration) for the head's shapes; nothing without a GPU."""
    from fastuper_kernels.gpu.configs import conv_key, heuristic, tuned

    if not torch.cuda.is_available():
        return
    device = torch.device("cuda", torch.cuda.current_device())
    found = tuned(device, may_measure())
    for layer in layers([512, 1024], [1, 8, 16]):
        x = torch.empty((), dtype=torch.bfloat16, device=device).expand(layer.shape)
        key = conv_key(x, *layer[1:])
        if key in found:
            yield key, "measured", str(found[key])
        else:
            yield key, "heuristic", str(heuristic(x, *layer[1:]))


def text_lines() -> Iterator[str]:
    """Yield the tables of `--show` as lines of text: the configurations, then the choice between kernel and cuDNN."""
    yield torch.cuda.get_device_name() if torch.cuda.is_available() else NO_GPU
    for row in (*configurations(), *rows([CONV])):
        yield ": ".join(row)


def _print_tables() -> None:
    if torch.cuda.is_available():
        print_table(torch.cuda.get_device_name(), ("convolution", "source", "configuration"), configurations())
    else:
        print(NO_GPU)
    show_choices([CONV])


def _fail(message: str) -> None:
    import typer

    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """Run the command."""
    import typer

    def tune(
        show_only: bool = typer.Option(False, "--show", help="Print the configuration of each shape; measure nothing."),
        sizes: str = typer.Option("512", help="Image sizes, separated by commas."),
        batches: str = typer.Option("1,8,16", help="Batch sizes, separated by commas."),
        dtypes: str = typer.Option("bfloat16", help="Dtypes, separated by commas."),
        output: str = typer.Option("", metavar="FILE", help="The file to write, instead of the cache folder's."),
    ) -> None:
        """Measure the convolutions' configurations on this GPU; the fastest go to the cache folder's tuned.json."""
        from fastuper_kernels.gpu.configs import conv_key, user_file

        if show_only:
            _print_tables()
            return
        if not torch.cuda.is_available():
            _fail("there is no GPU here to measure on")
        path = Path(output) if output else user_file()
        if path is None:
            _fail("there is no home folder to write to: give --output FILE, or set FASTUPER_CACHE")
            return
        try:
            lengths, counts = ([int(n) for n in text.split(",")] for text in (sizes, batches))
        except ValueError as error:
            _fail(f"--sizes and --batches are whole numbers, separated by commas: {error}")
            return
        entries = {}
        for name in dtypes.split(","):
            dtype = getattr(torch, name)
            for layer in layers(lengths, counts):
                key = conv_key(torch.empty(layer.shape, dtype=dtype, device="meta"), *layer[1:])
                entries[key] = measure(layer, dtype)
                print(key, entries[key], flush=True)
        write(path, torch.cuda.get_device_name(), entries)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(tune)
    app()


if __name__ == "__main__":
    main()
