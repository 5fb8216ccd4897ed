"""Times Unified Perceptual Parsing, all five tasks: `python -m bench.parsing` writes bench/results/parsing.json.

From a photo to the scene and four label maps of the photo's size. For each backbone these take turns: fastuper's
`parse`; the same network as papers write it, in both memory layouts (bench.textbook); `parse` of objects alone; and
`UperNetForSemanticSegmentation.segment` over the same backbone. The labels of all are compared before they are timed.
Peak memory over the weights is measured in fresh processes (see bench.memory), on a larger photo.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastuper
from bench.machine import commit, machine, now, versions
from bench.memory import json_of, peak_of
from bench.names import FASTUPER, OBJECTS, SEGMENTATION, TEXTBOOK
from bench.pairs import images, randomize, uninitialized
from bench.results import FOLDER, PARSING, parsing_targets
from bench.textbook import Textbook
from bench.timing import medians, rounded, seconds_of, turns
from fastuper.recipes import BACKBONES

RESULTS = FOLDER / "parsing.json"
SIZE, MEMORY_SIZE = (512, 512), (750, 1000)
CLASSES = 150  # of SEGMENTATION
PEERS = [*TEXTBOOK, FASTUPER, OBJECTS, SEGMENTATION]
IN_MEMORY = [*TEXTBOOK, FASTUPER]
# The largest share by which a label's probability may be below the best one, for rounding.
ROUNDING = 1e-3


def config_of(backbone: str) -> Any:
    """Return the configuration of the parsing network over a backbone, with the official tables."""
    return fastuper.UnifiedPerceptualParsingConfig(backbone_config=BACKBONES[backbone]())


def textbook(backbone: str) -> Textbook:
    """Return the network in PyTorch's modules, with random weights."""
    with uninitialized():
        model = Textbook(config_of(backbone))
    randomize(model)
    return model.eval()


def ours(backbone: str, weights: dict[str, torch.Tensor] | None = None) -> Any:
    """Return fastuper's network, with these weights or with random ones."""
    with uninitialized():
        model = fastuper.UperNetForUnifiedPerceptualParsing(config_of(backbone))
    if weights is None:
        randomize(model)
    else:
        model.load_state_dict(weights)
    return model.eval()


def segmenter(backbone: str) -> Any:
    """Return fastuper's semantic segmentation network over a backbone, with random weights."""
    config = fastuper.UperNetConfig(backbone_config=BACKBONES[backbone](), num_labels=CLASSES, use_auxiliary_head=False)
    with uninitialized():
        model = fastuper.UperNetForSemanticSegmentation(config)
    randomize(model)
    return model.eval()


def call_of(peer: str, model: Any, pixels: torch.Tensor) -> Callable[[], Any]:
    """Return a call from pixels (1, 3, H, W) to what the peer finds, label maps of the same H and W."""
    size = (pixels.shape[2], pixels.shape[3])
    if peer in TEXTBOOK:
        layout = torch.contiguous_format if peer == TEXTBOOK[0] else torch.channels_last
        model, pixels = model.to(memory_format=layout), pixels.contiguous(memory_format=layout)
        return lambda: model(pixels, size)
    if peer == SEGMENTATION:
        return lambda: model.segment(pixels)
    return lambda: model.parse(pixels, tasks=("object",) if peer == OBJECTS else None)


def compare(model: Textbook, parsed: Any, pixels: torch.Tensor) -> dict[str, int]:
    """Compare fastuper's scene and label maps with the textbook's probabilities.

    Returns:
        {task: the number of pixels whose label is not the textbook's}; both labels are tied there within rounding.

    Raises:
        AssertionError: a label is not among the best within rounding, or the five scenes' probabilities differ.
    """
    size = (pixels.shape[2], pixels.shape[3])
    probabilities = model.probabilities(pixels, size)
    numbers, shares = zip(*parsed.scene, strict=True)
    scenes = probabilities["scene"][0]
    for expected in (scenes[list(numbers)], scenes.topk(5).values):
        torch.testing.assert_close(torch.tensor(shares).to(scenes), expected, rtol=ROUNDING, atol=0)
    maps = {"object": parsed.objects, "material": parsed.materials, "texture": parsed.textures}
    differ = {task: differing(probabilities[task][0], labels, task) for task, labels in maps.items()}
    differ["part"] = 0
    known = torch.zeros(size, dtype=torch.bool)
    for part, (number, parts) in zip(probabilities["part"], model.config.object_parts.items(), strict=True):
        inside = parsed.objects == number
        known |= inside
        place = torch.zeros(max(parts) + 1, dtype=torch.int64)
        place[list(parts)] = torch.arange(1, 1 + len(parts))
        differ["part"] += differing(part[0][:, inside], place[parsed.parts[inside]], f"parts of object {number}")
    assert not parsed.parts[~known].any(), "a pixel has a part, and its object has none"
    return differ


def differing(probabilities: torch.Tensor, labels: torch.Tensor, name: str) -> int:
    """Return the number of pixels whose label is not the most probable; raise AssertionError if one is far from it."""
    if not labels.numel():
        return 0
    best = probabilities.amax(0)
    chosen = probabilities.gather(0, labels[None])[0]
    assert (chosen >= (1 - ROUNDING) * best).all(), f"{name}: a label is not the textbook's"
    return int((chosen < best).sum())


def rounds_of(backbone: str, rounds: int, size: tuple[int, int]) -> dict[str, Any]:
    """Return each peer's seconds in alternating turns, after the labels were compared."""
    with torch.inference_mode():
        pixels = images(1, 3, *size, dtype=torch.float32)
        network = textbook(backbone)
        model = ours(backbone, network.state_dict())
        (parsed,) = model.parse(pixels)
        differ = compare(network, parsed, pixels)
        (alone,) = model.parse(pixels, tasks=("object",))
        assert torch.equal(alone.objects, parsed.objects), "objects alone are not the objects of all tasks"
        present = len(parsed.objects.unique())
        # Each layout has its own copy of the weights.
        second = textbook(backbone)
        models = {TEXTBOOK[0]: network, TEXTBOOK[1]: second, SEGMENTATION: segmenter(backbone)}
        calls = {peer: call_of(peer, models.get(peer, model), pixels) for peer in PEERS}
        for call in calls.values():
            call()
        found: dict[str, list[float]] = {peer: [] for peer in PEERS}
        clocks = {peer: partial(seconds_of, call) for peer, call in calls.items()}
        for peer, seconds in turns(clocks, rounds):
            found[peer].append(rounded(seconds))
            print(backbone, peer, found[peer][-1], flush=True)
    peers = {peer: {"rounds": found[peer]} for peer in PEERS}
    return {"pixels": size[0] * size[1], "differ": differ, "objects": present, "peers": peers}


def peak(peer: str, backbone: str, height: int, width: int) -> dict[str, Any]:
    """Return the peak memory of one run over the weights. The process must be fresh."""
    model = textbook(backbone) if peer in TEXTBOOK else ours(backbone)
    call = call_of(peer, model, images(1, 3, height, width, dtype=torch.float32))
    with torch.inference_mode():
        return peak_of(call)


def peak_in_fresh_process(peer: str, backbone: str, size: tuple[int, int]) -> dict[str, Any]:
    found = json_of("bench.parsing", "--peak", peer, backbone, *map(str, size))
    if "skipped" in found:
        raise RuntimeError(f"{peer}, {backbone}: {found['skipped']}")
    return found


def conclude(row: dict[str, Any]) -> None:
    """Store a backbone's ratios: to the faster textbook, to objects alone, to segmentation; and that of the peaks."""
    seconds = medians(row["peers"])
    row["faster"] = min(seconds[peer] for peer in TEXTBOOK) / seconds[FASTUPER]
    row["over_objects"] = seconds[FASTUPER] / seconds[OBJECTS]
    row["over_segmentation"] = seconds[FASTUPER] / seconds[SEGMENTATION]
    peaks = {peer: found["peak"] for peer, found in row["peers"].items() if "peak" in found}
    row["memory"] = peaks[FASTUPER] / min(peaks[peer] for peer in TEXTBOOK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of each peer")
    parser.add_argument("--backbones", nargs="+", choices=PARSING, default=list(PARSING), metavar="NAME")
    parser.add_argument(
        "--quick", action="store_true", help="a round of small photos, to see that all runs; the file stays as it is"
    )
    parser.add_argument(
        "--peak",
        nargs=4,
        metavar=("PEER", "BACKBONE", "HEIGHT", "WIDTH"),
        help="measure the peak memory of one peer in this process",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results file")
    arguments = parser.parse_args()
    if arguments.peak:
        peer, backbone, height, width = arguments.peak
        print(json.dumps(peak(peer, backbone, int(height), int(width))))
        return
    size, memory_size = ((96, 128), (128, 160)) if arguments.quick else (SIZE, MEMORY_SIZE)
    result: dict[str, Any] = {
        "run": now(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "size": size,
        "memory_size": memory_size,
        "dtype": "float32",
        "backbones": {},
    }
    for backbone in arguments.backbones:
        row = rounds_of(backbone, 1 if arguments.quick else arguments.rounds, size)
        for peer in IN_MEMORY:
            row["peers"][peer].update(peak_in_fresh_process(peer, backbone, memory_size))
        conclude(row)
        result["backbones"][backbone] = row
        result["targets"] = parsing_targets(result)
        print(backbone, {key: value for key, value in row.items() if key != "peers"}, flush=True)
        if not arguments.quick:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
