"""A head on large images on a CPU: the steps at the finest level run in strips of rows that fit its cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastuper.models.heads.conv_module import classify, is_fusible
from fastuper.models.norms import fold
from fastuper.models.untouched import is_supported_conv
from fastuper_kernels import conv_bn_relu
from fastuper_kernels.cpu.packs import fingerprint_once
from fastuper_kernels.cpu.upsampled_conv import UpsampledConv3x3
from fastuper_kernels.dispatch.modes import autocast, is_eager_inference

if TYPE_CHECKING:
    from fastuper.models.heads.pyramid import PyramidSteps

# Bytes of a strip of a map of hidden_size channels at the finest level. A strip fits a CPU's cache, and is so small
# that malloc reuses its memory for the next strip; with 16 MB the memory went back to the system each time, and each
# page of the next strip cost a page fault. Images with a larger map run in strips.
STRIP_BYTES = 8 << 20

Strip = tuple[int, int, int]  # (start, stop, height)


class Output(NamedTuple):
    """Logits at the finest level: a map that a head reads, the 3x3 convolutions on it, and the classifier.

    Attributes:
        reads: "fused", the fusion of all levels; "finest", the finest level after its 3x3 convolution; or "map", the
            backbone's finest feature map.
        convs: 3x3 `ConvModule`s, one or more. The only output of a head may have none, if it reads "fused".
        classifier: a 1x1 convolution.
    """

    reads: str
    convs: tuple[Any, ...]
    classifier: Any


Outputs = Mapping[str, Output]


def apply_to(head: PyramidSteps, feature_maps: Sequence[torch.Tensor], outputs: Outputs) -> bool:
    """Return True if outputs should be computed in strips: large maps, eager inference on a CPU, untouched modules."""
    if len(feature_maps) < 2 or len(outputs) == 0:
        return False
    x = feature_maps[0]
    modules = _pyramid_modules(head, outputs)
    modules += [(conv, (3, 3)) for output in outputs.values() for conv in output.convs]
    return (
        is_eager_inference(x)
        and x.device.type == "cpu"
        and len(x) > 0
        and not head.align_corners
        and all(is_fusible(module, kernel) and module.is_foldable() for module, kernel in modules)
        and all(
            is_supported_conv(output.classifier) and output.classifier.kernel_size == (1, 1)
            for output in outputs.values()
        )
        and _bytes_of_row(x, [module for module, _ in modules]) * x.shape[2] > STRIP_BYTES
    )


def run(
    head: PyramidSteps, feature_maps: Sequence[torch.Tensor], pooled: torch.Tensor | None, outputs: Outputs
) -> dict[str, torch.Tensor]:
    """Return the logits (B, classes, H, W) of each output; the coarser levels are computed whole, as in `forward`.

    Args:
        head: `apply_to` returned True for this head and these outputs.
        feature_maps: as for the head.
        pooled: the coarsest level, from `psp_forward`; None if all outputs read the feature map.
        outputs: by name.
    """
    finest, *coarser, _ = feature_maps
    of_map = {name: output for name, output in outputs.items() if output.reads == "map"}
    of_pyramid = {name: output for name, output in outputs.items() if output.reads != "map"}
    results = {}
    if pooled is not None and of_pyramid:
        merged = head.top_down(coarser, pooled)
        levels = head.smooth(merged) if any(output.reads == "fused" for output in of_pyramid.values()) else []
        results = tail(head, finest, merged[0], levels, of_pyramid)
    for name, output in of_map.items():
        results[name] = of_feature_map(finest, output)
    return {name: results[name] for name in outputs}


def tail(
    head: PyramidSteps, x: torch.Tensor, above: torch.Tensor, levels: Sequence[torch.Tensor], outputs: Outputs
) -> dict[str, torch.Tensor]:
    """Compute the finest level, fuse all levels and classify, one image and one strip at a time.

    No map of hidden_size channels at the finest level is ever whole. A strip stays in cache until the last step has
    read it, and the next strip reuses its memory. No row is computed twice. Each step computes one row more below the
    strip than the step that reads it, and keeps its last two rows for the next strip.

    Args:
        head: `apply_to` returned True for this head and these outputs.
        x: the finest feature map, (B, C, H, W).
        above: (B, hidden_size, h, w), the next level of the top-down path before its 3x3 convolution.
        levels: all levels but the finest, as the fusion takes them; empty if no output reads the fusion.
        outputs: by name; each reads "fused" or "finest".

    Returns:
        (B, classes, H, W) in channels_last for each output.
    """
    x, above, *levels = autocast(x, above, *levels)
    results = {name: _empty(x, output) for name, output in outputs.items()}
    with fingerprint_once():
        for i in range(len(x)):
            logits = {name: result[i : i + 1] for name, result in results.items()}
            image = [maps[i : i + 1] for maps in (x, above, *levels)]
            _tail_of_image(head, outputs, logits, *image)
    return results


def of_feature_map(x: torch.Tensor, output: Output) -> torch.Tensor:
    """Return the logits (B, classes, H, W), in channels_last, of an output that reads the map x (B, C, H, W)."""
    (x,) = autocast(x)
    logits = _empty(x, output)
    with fingerprint_once():
        for image, result in zip(x.split(1), logits.split(1), strict=True):
            source = _Rows.of_whole(image, len(output.convs))
            _run(_chain(source, [conv.fused for conv in output.convs], output, result), image, output.convs)
    return logits


def _tail_of_image(
    head: PyramidSteps,
    outputs: Outputs,
    logits: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    above: torch.Tensor,
    *levels: torch.Tensor,
) -> None:
    """Write the logits (1, classes, H, W) of one image."""
    lateral: Any = head.lateral_convs[0]
    fpn: Any = head.fpn_convs[0]
    height = x.shape[2]

    def merge(strip: Strip) -> torch.Tensor:
        rows: torch.Tensor = lateral.fused(x[:, :, strip[0] : strip[1]], upsampled=above, strip=strip)
        return rows

    deepest = max(len(output.convs) + (output.reads == "fused") for output in outputs.values())
    merged = _Rows(height, deepest + 1, merge)
    finest = merged.convolved(fpn.fused)
    steps = [merged, finest]
    sources = {"finest": finest}
    if levels:
        fuse = _fusion(head.fpn_bottleneck, fpn.conv.weight.shape[0], levels, (height, x.shape[3]))
        if any(output.reads == "fused" and output.convs for output in outputs.values()):
            sources["fused"] = finest.convolved(fuse)
            steps.append(sources["fused"])
    for name, output in outputs.items():
        if output.reads in sources:
            convs = [conv.fused for conv in output.convs]
            steps += _chain(sources[output.reads], convs, output, logits[name])
        else:  # the only output classifies the fusion, which need not be held
            steps += _chain(finest, [fuse], output, logits[name])
    _run(steps, x, [fpn])


Convolve = Callable[..., torch.Tensor]  # (rows, strip=) -> rows


def _fusion(fusion: Any, channels: int, levels: Sequence[torch.Tensor], size: tuple[int, int]) -> Convolve:
    """Return the fusion of the finest level, of `channels` channels, with the coarser levels, as a function of rows."""
    weight, *weights = fusion.conv.weight.split([channels, *(level.shape[1] for level in levels)], dim=1)
    scale, shift = fold(fusion.batch_norm)
    coarser = UpsampledConv3x3(levels, weights, size)

    def fuse(rows: torch.Tensor, strip: Strip) -> torch.Tensor:
        return conv_bn_relu(rows, weight, scale, shift, addend=coarser.rows(*strip[:2]), strip=strip)

    return fuse


def _chain(source: _Rows, convs: Sequence[Convolve], output: Output, logits: torch.Tensor) -> list[_Rows]:
    """Return the steps from a map's rows to the logits (1, classes, H, W), which the last step writes."""
    steps = []
    for conv in convs[:-1]:
        source = source.convolved(conv)
        steps.append(source)
    return [*steps, _Logits(source, convs[-1], output.classifier, logits)]


def _run(steps: Sequence[_Rows], x: torch.Tensor, convs: Sequence[Any]) -> None:
    """Run steps, each after the steps that it reads, one strip at a time."""
    count = max(STRIP_BYTES // _bytes_of_row(x, convs) // 16 * 16, 16)
    for start in range(0, x.shape[2], count):
        for step in steps:
            step.extend_to(start + count)


class _Rows:
    """The rows of a map that the next steps read: the last two rows of the strip before, and this strip's rows.

    Args:
        height: of the map.
        reach: the rows below a strip that later 3x3 convolutions of the strip read.
        compute: returns the rows (1, C, stop - start, W) of a strip (start, stop, height).
    """

    held: torch.Tensor

    def __init__(self, height: int, reach: int, compute: Callable[[Strip], torch.Tensor]):
        self.height, self.reach, self.compute, self.end = height, reach, compute, 0

    @classmethod
    def of_whole(cls, x: torch.Tensor, reach: int) -> _Rows:
        """Return the rows of a map (1, C, H, W) that exists."""
        rows = cls(x.shape[2], reach, lambda strip: x)
        rows.extend_to(x.shape[2])
        return rows

    def extend_to(self, stop: int) -> None:
        """Compute the rows that a strip ending at `stop` needs, and drop all older rows but two."""
        start, stop = self.end, min(stop + self.reach, self.height)
        if start < stop:
            self.keep(self.compute((start, stop, self.height)))
            self.end = stop

    def keep(self, rows: torch.Tensor) -> None:
        """Hold new rows."""
        self.held = rows if self.end == 0 else torch.cat([self.held[:, :, -2:], rows], dim=2)

    def around(self, strip: Strip) -> torch.Tensor:
        """Return the rows that a 3x3 convolution of a strip reads: the strip and its neighbours inside the map."""
        first = self.end - self.held.shape[2]
        return self.held[:, :, max(strip[0] - 1, 0) - first : min(strip[1] + 1, self.height) - first]

    def convolved(self, conv: Convolve) -> _Rows:
        """Return the rows after a 3x3 convolution of these rows."""
        return _Rows(self.height, self.reach - 1, lambda strip: conv(self.around(strip), strip=strip))


class _Logits(_Rows):
    """The rows of logits, written to a tensor.

    Args:
        source: the rows before the last 3x3 convolution.
        conv: this convolution.
        classifier: a 1x1 convolution.
        logits: (1, classes, H, W).
    """

    def __init__(self, source: _Rows, conv: Convolve, classifier: Any, logits: torch.Tensor):
        super().__init__(
            source.height,
            source.reach - 1,
            lambda strip: classify(classifier, conv(source.around(strip), strip=strip)),
        )
        self.logits = logits

    def keep(self, rows: torch.Tensor) -> None:
        """Write new rows."""
        self.logits[:, :, self.end : self.end + rows.shape[2]] = rows


def _pyramid_modules(head: PyramidSteps, outputs: Outputs) -> list[tuple[Any, tuple[int, int]]]:
    """Return the modules at the finest level that outputs need, with the sizes of their kernels."""
    reads = {output.reads for output in outputs.values()}
    modules: list[tuple[Any, tuple[int, int]]] = []
    if reads - {"map"}:
        modules += [(head.lateral_convs[0], (1, 1)), (head.fpn_convs[0], (3, 3))]
    if "fused" in reads:
        modules.append((head.fpn_bottleneck, (3, 3)))
    return modules


def _bytes_of_row(x: torch.Tensor, convs: Sequence[Any]) -> int:
    """Return the bytes of a row of x's width after the widest of some `ConvModule`s."""
    return int(x.shape[3] * max(conv.conv.weight.shape[0] for conv in convs) * x.element_size())


def _empty(x: torch.Tensor, output: Output) -> torch.Tensor:
    """Return new logits (B, classes, H, W) in channels_last, of x's size."""
    size = (len(x), output.classifier.weight.shape[0], *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
