"""Segment a generated scene with the command line, do the same with Transformers, and count the pixels that differ.

The model is the small one that comes with the package; it was trained on other scenes (see docs/scenes.md).

    python examples/demo.py                          writes demo/demo.png and what the command line writes
    python examples/demo.py --figure docs/demo.png   also writes the picture there
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from transformers import UperNetForSemanticSegmentation as TheirModel

from fastuper.evaluation.confusion import ConfusionMatrix
from fastuper.scenes import ID2LABEL, MODEL, PALETTE, load_model, scene
from fastuper_kernels.dispatch.files import atomic_path

try:  # Transformers 5: the processor that resizes with Pillow, as 4.x does
    from transformers import SegformerImageProcessorPil as TheirProcessor
except ImportError:
    from transformers import SegformerImageProcessor as TheirProcessor

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "demo"
SEED = 5  # neither among the best nor the worst; training began at 10,000
ROUNDS = 9

Labels = NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, metavar="PATH", help="write the picture here too")
    figure_path = parser.parse_args().figure

    transformers.utils.logging.disable_progress_bar()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    photo, truth = scene(SEED)
    photo_path = OUTPUT / "scene.png"
    with atomic_path(photo_path) as temporary:
        photo.save(temporary, format="PNG")

    command = ["fastuper", "segment", shown(photo_path), "--output", shown(OUTPUT), "--device", "cpu"]
    print(f"$ {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)
    with Image.open(OUTPUT / "scene_labels.png") as image:
        ours = np.asarray(image).astype(np.int64)

    print(f"\nTransformers {transformers.__version__}, the same model and picture ...", flush=True)
    with torch.inference_mode():
        our_seconds, their_seconds, theirs, tied = compare(photo)
    different = ours != theirs
    verdict = f"{different.sum():,} of {different.size:,} pixels differ"
    if different.any():
        verdict += f", {(different & ~tied).sum():,} of them where the two best classes are not tied in float32"
    matrix = ConfusionMatrix(len(ID2LABEL), id2label=ID2LABEL)
    matrix.update(ours, truth.astype(np.int64))
    right = f"{matrix.pixel_accuracy:.1%} of the pixels are right, mean IoU {matrix.mean_iou:.3f}"
    seconds = f"fastuper {our_seconds:.3f} s, Transformers {their_seconds:.3f} s ({their_seconds / our_seconds:.1f} x)"
    how = f"from picture to label map, float32, {torch.get_num_threads()} threads, medians of {ROUNDS} rounds in turns"

    wrong = ours != truth
    differences = f"Pixels that differ: {different.sum():,} of {different.size:,}"
    picture = draw(
        [
            (f"Scene {SEED}", "generated, not trained on", photo),
            ("Truth", "", coloured(truth)),
            ("Wrong pixels", f"{wrong.mean():.1%}, mean IoU {matrix.mean_iou:.3f}", marked(photo, wrong)),
            ("fastuper", f"{our_seconds:.3f} s", coloured(ours)),
            (f"Transformers {transformers.__version__}", f"{their_seconds:.3f} s", coloured(theirs)),
            (differences, "", marked(photo, different, thicker=7)),
        ],
        f"Seconds {how}; PyTorch {torch.__version__}. The model has 1.7 million parameters and comes with the package.",
    )
    written = [OUTPUT / "demo.png", *([figure_path.resolve()] if figure_path else [])]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            picture.save(temporary, format="PNG", optimize=True)

    print(f"\n{verdict}.\n{right}.\n{seconds}, {how}.")
    print(f"Look at {', '.join(shown(path) for path in written)} and {shown(OUTPUT / 'scene_overlay.jpg')}.")
    if (different & ~tied).any():
        sys.exit("The label maps are not the same.")


def shown(path: Path) -> str:
    """The path as one would type it."""
    return os.path.relpath(path)


def compare(photo: Image.Image) -> tuple[float, float, Labels, NDArray[np.bool_]]:
    """Our seconds and Transformers', its label map, (H, W), and where its two best logits are tied in float32."""
    size = (photo.height, photo.width)
    our_model, our_processor = load_model()
    their_model = TheirModel.from_pretrained(MODEL, dtype=torch.float32).eval()
    their_processor = TheirProcessor.from_pretrained(MODEL)

    def ours() -> None:
        our_model.segment(**our_processor(images=photo, return_tensors="pt"), target_sizes=[size])

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        outputs = their_model(**their_processor(images=photo, return_tensors="pt"))
        return outputs.logits, their_processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]

    for run in (ours, ours, theirs, theirs):
        run()
    rounds = [(timed(ours), timed(theirs)) for _ in range(ROUNDS)]
    our_seconds, their_seconds = (statistics.median(times) for times in zip(*rounds, strict=True))

    logits, labels = theirs()
    logits = torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]
    best, second = logits.topk(2, dim=0).values
    tied = best - second <= 8 * torch.finfo(torch.float32).eps * logits.abs().max()
    return our_seconds, their_seconds, labels.numpy(), tied.numpy()


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def coloured(labels: NDArray[np.integer]) -> Image.Image:
    return Image.fromarray(PALETTE[labels])


def marked(photo: Image.Image, spots: NDArray[np.bool_], thicker: int = 1) -> Image.Image:
    """The photo, pale, with some pixels in magenta."""
    grey = np.asarray(photo.convert("L").point(lambda level: 215 + level * 40 // 255).convert("RGB"))
    mask = np.asarray(Image.fromarray(spots).convert("L").filter(ImageFilter.MaxFilter(thicker))) > 0
    return Image.fromarray(np.where(mask[..., None], np.array([214, 0, 110], dtype=np.uint8), grey))


def draw(panels: list[tuple[str, str, Image.Image]], note: str) -> Image.Image:
    """Panels, three in a row, each under its title and a note; below them the classes' colours and a line."""
    gap, title_height, footer_height, width = 24, 44, 104, 512
    height = round(width * panels[0][2].height / panels[0][2].width)
    rows = len(panels) // 3
    size = (3 * width + 4 * gap, rows * (title_height + height + gap // 2) + footer_height)
    picture, ink, faint = Image.new("RGB", size, "white"), (32, 33, 36), (105, 109, 115)
    pen = ImageDraw.Draw(picture)
    title_font, small_font = ImageFont.load_default(size=22), ImageFont.load_default(size=18)
    for index, (title, remark, panel) in enumerate(panels):
        left = gap + index % 3 * (width + gap)
        top = index // 3 * (title_height + height + gap // 2)
        pen.text((left, top + title_height - 12), title, fill=ink, font=title_font, anchor="ls")
        pen.text((left + width, top + title_height - 12), remark, fill=faint, font=small_font, anchor="rs")
        picture.paste(panel.resize((width, height), Image.Resampling.BICUBIC), (left, top + title_height))
    top = picture.height - footer_height
    for index, name in ID2LABEL.items():
        left = gap + index * (picture.width - gap) // len(ID2LABEL)
        pen.rectangle((left, top + 18, left + 26, top + 38), fill=tuple(map(int, PALETTE[index])), outline=faint)
        pen.text((left + 36, top + 28), name, fill=ink, font=small_font, anchor="lm")
    pen.text((gap, top + 74), note, fill=faint, font=small_font, anchor="lm")
    palette = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE)  # a third of the size
    return picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


if __name__ == "__main__":
    main()
