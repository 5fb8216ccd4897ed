"""Recognises the checkpoints of other libraries: by their files, and by the names in a state dict.

Every model imports this file; the dialects themselves are imported when a checkpoint is converted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from fastuper.io.files import read_json

CONVERT = "run `fastuper convert` on the file"
LIBRARIES = (
    (r".*\.(lora_[AB]|base_layer)\.", "a LoRA adapter of peft", "load its base model, then the adapter with peft"),
    (r"(decode|auxiliary)_head\.conv_seg\.", "mmsegmentation", CONVERT),
    (r"(ppm_conv|conv_fusion)\.", "Unified Perceptual Parsing's official code", "run `fastuper convert` on its folder"),
    (r"(decoder|segmentation_head)\.", "segmentation_models_pytorch", CONVERT),
    (r"(downsample_layers|stages\.\d+\.\d+)\.", "ConvNeXt's authors", CONVERT),
    (r"(stages\.\d+\.blocks|stem|layers_\d+)\.", "timm", CONVERT),
    (r"(patch_embed|layers\.\d+\.blocks)\.", "Swin's authors, or timm", CONVERT),
    (r"layer[1-4]\.\d+\.conv\d\.", "torchvision or timm", CONVERT),
)
"""The beginning of a name that only one library's models have, the library, and the remedy."""

WRAPPERS = {
    "module": "DistributedDataParallel or DataParallel",
    "_orig_mod": "torch.compile",
    "base_model": "peft",
}
"""Modules that wrap a model, by the component that they put before the names."""


def is_foreign(source: str | os.PathLike[str]) -> bool:
    """Return True if a path is a file, or a folder of another library; False for a model folder and a Hub id.

    A name that ends as a weight file's does is a file, also where there is none.

    Raises:
        OSError: the folder's config.json is not valid JSON.
    """
    path = Path(source)
    if not os.path.isdir(source):  # `Path.is_dir` raises an error for names of great length
        suffix = path.suffix.lower()
        return (os.path.isfile(source) and suffix != ".json") or suffix in (".pth", ".pt", ".ckpt", ".safetensors")
    if (path / "config.json").is_file():
        values = read_json(path / "config.json")
        return "architecture" in values or "encoder_name" in values
    return any(
        entry.suffix.lower() in (".pth", ".pt", ".ckpt") or entry.name.startswith("encoder_")
        for entry in path.iterdir()
    )


def describe(names: Iterable[str], own: Collection[str]) -> str:
    """Return a clause about names that do not fit a model: whose they are, and the remedy.

    Args:
        names: the names in the file.
        own: the names of the model's tensors.
    """
    names = list(names)
    if not names:
        return "the file holds only a part of a checkpoint; pass output_loading_info=True to load it all the same"
    if any(f"backbone.{name}" in own for name in names):
        return "the names are a backbone's: put 'backbone.' before each"
    for count in (1, 2, 3):
        prefix = ".".join(names[0].split(".")[:count]) + "."
        if all(name.startswith(prefix) for name in names) and any(name[len(prefix) :] in own for name in names):
            wrapper = WRAPPERS.get(prefix.split(".")[0], "the module around the model")
            return f"all names begin with {prefix!r}, of {wrapper}: save the state dict of the model inside"
    if (found := library_of(names)) is not None:
        return f"the names are those of {found[0]}: {found[1]}"
    return "it belongs to another model, or to another configuration"


def library_of(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the library whose models have such names, and the remedy; None if no library is known for them."""
    names = list(names)
    for pattern, library, remedy in LIBRARIES:
        if any(re.match(pattern, name) for name in names):
            return library, remedy
    return None
