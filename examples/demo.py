"""Segment a generated scene with the command line and with Transformers, compare the label maps, and time both.

The scene was not in the training data. The demo model is small and only knows drawn scenes (docs/scenes.md); for
photos, load a Hub checkpoint. A full-size UPerNet-ConvNeXt-T with random weights is timed too, at 512 x 512.

    python -m examples.demo                          writes demo/demo.png and the command line's files
    python -m examples.demo --figure docs/demo.png   also writes the picture to docs/demo.png

Run it in the root of the clone, where `bench` lies, whose timer it uses.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from transformers import UperNetForSemanticSegmentation as TheirModel

from bench.machine import machine
from bench.timing import seconds_of, turns
from fastuper import UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.evaluation import ConfusionMatrix
from fastuper.scenes import ID2LABEL, MODEL, PALETTE, load_model, scene
from fastuper_kernels.dispatch.files import atomic_path

try:  # Transformers 5: the processor that resizes with Pillow, as 4.x does
    from transformers import SegformerImageProcessorPil as TheirProcessor
except ImportError:
    from transformers import SegformerImageProcessor as TheirProcessor

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "demo"
SEED = 5  # neither among the best nor the worst; training seeds start at 10,000
ROUNDS = 9
FULL_SIZE = 512  # height and width of the full-size model's image
FULL_SIZE_ROUNDS = 3

OURS, THEIRS, INK, FAINT = (217, 72, 15), (173, 181, 189), (32, 33, 36), (105, 109, 115)

Labels = NDArray[np.int64]


class Comparison(NamedTuple):
    """The label maps (H, W) of one picture by both libraries, and the median seconds of each.

    `tied` is where Transformers' two best logits are equal within float32's rounding.
    """

    our_labels: Labels
    their_labels: Labels
    tied: NDArray[np.bool_]
    our_seconds: float
    their_seconds: float

    def different(self) -> NDArray[np.bool_]:
        """Return where the two label maps differ, (H, W)."""
        return self.our_labels != self.their_labels

    def wrong(self) -> int:
        """Return how many pixels differ where the two best classes are not tied."""
        return int((self.different() & ~self.tied).sum())

    def verdict(self) -> str:
        """Return how many pixels differ, as text."""
        different = self.different()
        text = f"{different.sum():,} of {different.size:,} pixels differ"
        if different.any():
            text += f", {self.wrong():,} of them where the two best classes are not tied in float32"
        return text

    def seconds(self) -> str:
        """Return the times and their ratio, as text."""
        ratio = self.their_seconds / self.our_seconds
        return f"fastuper {self.our_seconds:.3f} s, Transformers {self.their_seconds:.3f} s ({ratio:.1f} x)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, metavar="PATH", help="write the picture to this file too")
    figure_path = parser.parse_args().figure

    transformers.utils.logging.disable_progress_bar()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for earlier in OUTPUT.glob("scene_*"):  # the command never overwrites a file that its record does not name
        earlier.unlink()
    photo, truth = scene(SEED)
    photo_path = OUTPUT / "scene.png"
    with atomic_path(photo_path) as temporary:
        photo.save(temporary, format="PNG")

    print(
        "This scene was not in the training data. The demo model only knows drawn scenes; "
        "for photos, load a Hub checkpoint.\n"
    )
    command = ["fastuper", "segment", shown(photo_path), "--output", shown(OUTPUT), "--device", "cpu"]
    print(f"$ {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)
    with Image.open(OUTPUT / "scene_labels.png") as image:
        written_labels = np.asarray(image).astype(np.int64)

    print(f"\nTransformers {transformers.__version__}, the same model and picture ...", flush=True)
    small = compare_demo_model(photo)
    print(f"UPerNet-ConvNeXt-T with random weights, {FULL_SIZE} x {FULL_SIZE}, both libraries ...", flush=True)
    large = compare_full_size(photo)

    small = small._replace(our_labels=written_labels)
    matrix = ConfusionMatrix(len(ID2LABEL), id2label=ID2LABEL)
    matrix.update(written_labels, truth.astype(np.int64))
    right = f"{matrix.pixel_accuracy:.1%} of the pixels are right, mean IoU {matrix.mean_iou:.3f}"
    how = "Medians of rounds in turns, from picture to label map, float32"

    wrong = written_labels != truth
    overlay = Image.blend(photo, coloured(written_labels), 0.6)
    picture = draw(
        [
            (f"Scene {SEED}", "not in the training data", photo),
            ("Segmented by fastuper", f"mean IoU {matrix.mean_iou:.3f}", overlay),
            ("Truth", "", coloured(truth)),
            ("Wrong pixels", f"{wrong.mean():.1%}", marked(photo, wrong)),
            (
                "Pixels that differ from Transformers'",
                f"{small.different().sum():,} of {small.different().size:,}",
                marked(photo, small.different(), thicker=7),
            ),
            (
                "Seconds",
                "",
                bars(
                    [
                        ("Demo model, 1.7 M parameters, 384 x 512", small),
                        (f"UPerNet-ConvNeXt-T, random weights, {FULL_SIZE} x {FULL_SIZE}", large),
                    ],
                    photo.size,
                ),
            ),
        ],
        f"{how}. {conditions()}",
    )
    written = [OUTPUT / "demo.png", *([figure_path.resolve()] if figure_path else [])]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            picture.save(temporary, format="PNG", optimize=True)

    print(f"\nDemo model: {small.verdict()}.\n{right}.\n{small.seconds()}.")
    print(f"\nFull-size model: {large.verdict()}.\n{large.seconds()}.")
    print(f"\n{how}. {conditions()}")
    print(f"Pictures: {', '.join(shown(path) for path in written)} and {shown(OUTPUT / 'scene_overlay.jpg')}.")
    if small.wrong() or large.wrong():
        sys.exit("The label maps are not the same.")


def shown(path: Path) -> str:
    """Return a path relative to the current folder."""
    return os.path.relpath(path)


def conditions() -> str:
    """Return the processor, the number of threads, the libraries' versions and today's date."""
    here = machine()
    threads = here["threads"]
    return (
        f"{here['cpu']} ({here['instructions']}), {threads} thread{'s' * (threads != 1)}; "
        f"PyTorch {torch.__version__}, Transformers {transformers.__version__}; {date.today()}."
    )


def compare_demo_model(photo: Image.Image) -> Comparison:
    """Compare both libraries with the demo model's checkpoint."""
    our_model, our_processor = load_model()
    their_model = TheirModel.from_pretrained(MODEL, dtype=torch.float32).eval()
    return compare(photo, our_model, our_processor, their_model, TheirProcessor.from_pretrained(MODEL), ROUNDS)


def compare_full_size(photo: Image.Image) -> Comparison:
    """Compare both libraries with a UPerNet-ConvNeXt-T of 150 classes, whose random weights are the same in both."""
    torch.manual_seed(0)
    config = transformers.UperNetConfig(
        backbone_config=transformers.ConvNextConfig(
            depths=[3, 3, 9, 3],
            hidden_sizes=[96, 192, 384, 768],
            layer_scale_init_value=0.3,  # the default, 1e-6, makes every block the identity
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        num_labels=150,
    )
    their_model = TheirModel(config).eval()
    our_model = UperNetForSemanticSegmentation(config).eval()
    our_model.load_state_dict(their_model.state_dict())
    size = {"height": FULL_SIZE, "width": FULL_SIZE}
    photo = photo.resize((FULL_SIZE, FULL_SIZE), Image.Resampling.BICUBIC)
    processors = UperNetImageProcessor(size=size), TheirProcessor(size=size)
    return compare(photo, our_model, processors[0], their_model, processors[1], FULL_SIZE_ROUNDS)


@torch.inference_mode()
def compare(
    photo: Image.Image, our_model: Any, our_processor: Any, their_model: Any, their_processor: Any, rounds: int
) -> Comparison:
    """Segment a photo with both libraries, in turns, and return the label maps and the times."""
    size = (photo.height, photo.width)

    def ours() -> torch.Tensor:
        return our_model.segment(**our_processor(images=photo, return_tensors="pt"), target_sizes=[size])[0]

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        outputs = their_model(**their_processor(images=photo, return_tensors="pt"))
        return outputs.logits, their_processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]

    ours()  # the first run rearranges weights, and measures which ways are faster here
    our_labels = ours()
    logits, their_labels = theirs()
    logits = torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]
    best, second = logits.topk(2, dim=0).values
    tied = best - second <= 8 * torch.finfo(torch.float32).eps * logits.abs().max()
    del logits, best, second

    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for library, turn in turns({"ours": lambda: seconds_of(ours), "theirs": lambda: seconds_of(theirs)}, rounds):
        seconds[library].append(turn)
    medians = (statistics.median(seconds[library]) for library in ("ours", "theirs"))
    return Comparison(our_labels.numpy(), their_labels.numpy(), tied.numpy(), *medians)


def coloured(labels: NDArray[np.integer]) -> Image.Image:
    """Return a label map (H, W) in its classes' colours."""
    return Image.fromarray(PALETTE[labels])


def marked(photo: Image.Image, spots: NDArray[np.bool_], thicker: int = 1) -> Image.Image:
    """Return the photo in pale grey, with the pixels of a mask (H, W) in magenta."""
    grey = np.asarray(photo.convert("L").point(lambda level: 215 + level * 40 // 255).convert("RGB"))
    mask = np.asarray(Image.fromarray(spots).convert("L").filter(ImageFilter.MaxFilter(thicker))) > 0
    return Image.fromarray(np.where(mask[..., None], np.array([214, 0, 110], dtype=np.uint8), grey))


def bars(groups: list[tuple[str, Comparison]], size: tuple[int, int]) -> Image.Image:
    """Return a bar for the seconds of each library, under the title of each comparison; `size` is (width, height)."""
    panel = Image.new("RGB", size, "white")
    pen, font, top = ImageDraw.Draw(panel), ImageFont.load_default(size=18), 0
    longest = max(max(found.our_seconds, found.their_seconds) for _, found in groups)
    left, room, step = 120, size[0] - 290, size[1] // (3 * len(groups) + 1)
    for title, found in groups:
        pen.text((0, top + step // 2), title, fill=INK, font=font, anchor="lm")
        ratio = f"  ({found.their_seconds / found.our_seconds:.1f} x)"
        for row, (name, seconds, colour, remark) in enumerate(
            [("fastuper", found.our_seconds, OURS, ""), ("Transformers", found.their_seconds, THEIRS, ratio)], start=1
        ):
            middle, width = top + row * step + step // 2, max(2, round(room * seconds / longest))
            pen.text((left - 10, middle), name, fill=INK, font=font, anchor="rm")
            pen.rectangle((left, middle - step // 3, left + width, middle + step // 3), fill=colour)
            pen.text((left + width + 8, middle), f"{seconds:.2f} s{remark}", fill=INK, font=font, anchor="lm")
        top += 3 * step + step // 2
    return panel


def draw(panels: list[tuple[str, str, Image.Image]], note: str) -> Image.Image:
    """Return panels, three in a row, each under its title and remark; below them the classes' colours and a note."""
    gap, title_height, footer_height, width = 24, 44, 104, 512
    height = round(width * panels[0][2].height / panels[0][2].width)
    rows = len(panels) // 3
    size = (3 * width + 4 * gap, rows * (title_height + height + gap // 2) + footer_height)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    title_font, small_font = ImageFont.load_default(size=22), ImageFont.load_default(size=18)
    for index, (title, remark, panel) in enumerate(panels):
        left = gap + index % 3 * (width + gap)
        top = index // 3 * (title_height + height + gap // 2)
        pen.text((left, top + title_height - 12), title, fill=INK, font=title_font, anchor="ls")
        pen.text((left + width, top + title_height - 12), remark, fill=FAINT, font=small_font, anchor="rs")
        picture.paste(panel.resize((width, height), Image.Resampling.BICUBIC), (left, top + title_height))
    top = picture.height - footer_height
    for index, name in ID2LABEL.items():
        left = gap + index * (picture.width - gap) // len(ID2LABEL)
        pen.rectangle((left, top + 18, left + 26, top + 38), fill=tuple(map(int, PALETTE[index])), outline=FAINT)
        pen.text((left + 36, top + 28), name, fill=INK, font=small_font, anchor="lm")
    pen.text((gap, top + 74), note, fill=FAINT, font=small_font, anchor="lm")
    palette = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE)  # a third of the size
    return picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


if __name__ == "__main__":
    main()
