"""Segment a photograph with the command line, do the same with Transformers, and count the pixels that differ.

The model is a UPerNet-ConvNeXt-Tiny of full size with random weights, made once and kept in .cache/: it shows that the
two libraries compute the same thing, and nothing about what is in the photo.

    python examples/demo.py                          writes demo/demo.png and what the command line writes
    python examples/demo.py --figure docs/demo.png   also writes the picture there
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import skimage
import torch
import transformers
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import nn
from transformers import UperNetForSemanticSegmentation as TheirModel

from fastuper import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.hub import atomic_path
from fastuper.images import ade20k_names, ade20k_palette, blend, read_image

try:  # Transformers 5: the processor that resizes with Pillow, as 4.x does
    from transformers import SegformerImageProcessorPil as TheirProcessor
except ImportError:
    from transformers import SegformerImageProcessor as TheirProcessor

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "demo"
OUTPUT = ROOT / "demo"
MODEL = CACHE / "upernet-convnext-tiny-random-1"
"""The number at the end goes up whenever `make_model` changes, so that nobody keeps an older model."""

PHOTO_CREDIT = "Photograph: Rachel Michetti (CC0), from scikit-image"
CLASSES_SHOWN = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, metavar="PATH", help="write the picture here too")
    figure_path = parser.parse_args().figure

    transformers.utils.logging.disable_progress_bar()
    CACHE.mkdir(parents=True, exist_ok=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    photo_path = CACHE / "coffee.png"
    with atomic_path(photo_path) as temporary:
        Image.fromarray(skimage.data.coffee()).save(temporary)
    photo = read_image(photo_path)
    if not MODEL.is_dir():
        print(f"Making a UPerNet-ConvNeXt-Tiny with random weights in {shown(MODEL)} (once) ...", flush=True)
        make_model(MODEL, photo)

    command = ["fastuper", "segment", shown(photo_path), "--model", shown(MODEL), "--output", shown(OUTPUT)]
    command += ["--device", "cpu"]
    print(f"\n$ {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)
    with Image.open(OUTPUT / "coffee_labels.png") as image:
        ours = np.asarray(image).astype(np.int64)

    print(f"\nTransformers {transformers.__version__}, the same folder and photo ...", flush=True)
    theirs, near_ties = segment_with_transformers(photo)
    different = ours != theirs
    verdict = f"{different.sum():,} of {different.size:,} pixels differ"
    if different.any():
        verdict += f", {(different & ~near_ties).sum():,} of them where the two best classes are not tied in float32"

    picture = draw(photo, ours, theirs, different)
    written = [OUTPUT / "demo.png", *([figure_path.resolve()] if figure_path else [])]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            picture.save(temporary, optimize=True)

    print(f"\n{verdict}.")
    print("The weights are random: names, colours and shares of classes mean nothing. No trained weights ship yet.")
    print(f"Look at {', '.join(shown(path) for path in written)} and {shown(OUTPUT / 'coffee_overlay.jpg')}.")


def shown(path: Path) -> str:
    """The path as one would type it."""
    return os.path.relpath(path)


def make_model(folder: Path, photo: Image.Image) -> None:
    """Write a checkpoint folder as the Hub has them, with random weights whose label map of this photo is not noise.

    Backbone and head are Kaiming-normal. The BatchNorms have this photo's statistics, and 32 rows of the classifier are
    centres of groups of this photo's features: each such class wins where the features are like its centre.
    """
    generator = torch.manual_seed(0)
    names = dict(enumerate(ade20k_names()))
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ConvNextConfig(depths=[3, 3, 9, 3], hidden_sizes=[96, 192, 384, 768], out_features=stages)
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, id2label=names)).eval()
    processor = UperNetImageProcessor()
    pixels = processor(images=[photo], return_tensors="pt")["pixel_values"]

    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            nn.init.constant_(parameter, 0.3)
        elif parameter.ndim >= 2:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu" if "head" in name else "linear")
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)

    seen: dict[str, torch.Tensor] = {}
    classifier = model.decode_head.classifier
    hook = classifier.register_forward_pre_hook(lambda _, inputs: seen.update(features=inputs[0]))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        # The mirror image too: one pooled cell of one image has no variance.
        model(torch.cat([pixels, pixels.flip(3)]))
        for norm in norms:
            norm.momentum = 0.1
            norm.eval()
        model(pixels)
    hook.remove()

    features = seen["features"][0].flatten(1).T
    mean = features.mean(0)
    centres = group_centres(features - mean, CLASSES_SHOWN, generator)
    classes = torch.randperm(len(names), generator=generator)[:CLASSES_SHOWN]
    # The nearest centre c of a feature f is the one with the largest (f - mean) c - |c|^2 / 2.
    biases = -centres @ mean - centres.square().sum(1) / 2
    with torch.no_grad():
        classifier.weight.zero_()
        classifier.bias.fill_(biases.min() - 100)
        classifier.weight[classes, :, 0, 0] = centres
        classifier.bias[classes] = biases

    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    unfinished.rename(folder)


def group_centres(points: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """K-means, eight rounds: (N, C) points -> (count, C) centres."""
    centres = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(8):
        nearest = torch.cdist(points, centres).argmin(1)
        centres = torch.stack(
            [points[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(count)]
        )
    return centres


@torch.inference_mode()
def segment_with_transformers(photo: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Transformers' label map, (H, W), and where its two best logits are closer than float32 can tell apart."""
    model = TheirModel.from_pretrained(MODEL).eval()
    processor = TheirProcessor.from_pretrained(MODEL)
    size = (photo.height, photo.width)
    outputs = model(**processor(images=photo, return_tensors="pt"))
    labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]
    logits = nn.functional.interpolate(outputs.logits, size=size, mode="bilinear", align_corners=False)[0]
    best, second = logits.topk(2, dim=0).values
    tolerance = 8 * torch.finfo(torch.float32).eps * logits.abs().max()
    return labels.numpy(), (best - second <= tolerance).numpy()


def draw(photo: Image.Image, ours: np.ndarray, theirs: np.ndarray, different: np.ndarray) -> Image.Image:
    """Photo, both label maps and their difference, two by two, 1600 pixels wide."""
    gap, title_height, footer_height = 24, 52, 88
    width = (1600 - 3 * gap) // 2
    height = round(width * photo.height / photo.width)
    palette = ade20k_palette()
    grey = photo.convert("L").point(lambda level: 215 + level * 40 // 255).convert("RGB")
    spots = np.asarray(Image.fromarray(different).convert("L").filter(ImageFilter.MaxFilter(7))) > 0  # to be seen
    marked = np.where(spots[..., None], np.array([214, 0, 110], dtype=np.uint8), np.asarray(grey))
    panels = [
        ("Photograph", "", photo),
        ("fastuper", "labels over the photo", blend(photo, ours, palette)),
        (f"Transformers {transformers.__version__}", "labels over the photo", blend(photo, theirs, palette)),
        (f"Pixels that differ: {different.sum():,} of {different.size:,}", "", Image.fromarray(marked)),
    ]
    ink, faint = (32, 33, 36), (105, 109, 115)
    picture = Image.new("RGB", (1600, 2 * (title_height + height) + gap // 2 + footer_height), "white")
    pen = ImageDraw.Draw(picture)
    title_font, small_font = ImageFont.load_default(size=26), ImageFont.load_default(size=20)
    for index, (title, note, panel) in enumerate(panels):
        left = gap + index % 2 * (width + gap)
        top = index // 2 * (title_height + height + gap // 2)
        pen.text((left, top + title_height - 14), title, fill=ink, font=title_font, anchor="ls")
        pen.text((left + width, top + title_height - 14), note, fill=faint, font=small_font, anchor="rs")
        picture.paste(panel.resize((width, height), Image.Resampling.BICUBIC), (left, top + title_height))
    warning = (
        "Random weights: the classes mean nothing, only whether both libraries agree. No trained weights ship yet."
    )
    bottom = picture.height - footer_height
    pen.text((gap, bottom + 28), warning, fill=ink, font=small_font, anchor="lm")
    pen.text((gap, bottom + 58), PHOTO_CREDIT, fill=faint, font=small_font, anchor="lm")
    palette = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE)  # a third of the size
    return picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


if __name__ == "__main__":
    main()
