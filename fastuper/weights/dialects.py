"""Recognises state dicts whose names are not the Hub's, for the message of an error."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

LIBRARIES = (
    (r"(decode|auxiliary)_head\.conv_seg\.", "mmsegmentation"),
    (r"(decoder|segmentation_head)\.", "segmentation_models_pytorch"),
    (r"(base_model\.|.*\.lora_[AB]\.)", "a LoRA adapter of peft"),
    (r"(downsample_layers|stages\.\d+\.\d+)\.", "ConvNeXt's authors"),
    (r"(stages\.\d+\.blocks|stem|layers_\d+)\.", "timm"),
    (r"(patch_embed|layers\.\d+\.blocks)\.", "Swin's authors, or timm"),
    (r"layer[1-4]\.\d+\.conv\d\.", "torchvision or timm"),
)
"""The beginning of a name that only this library's models have."""

WRAPPERS = {
    "module": "DistributedDataParallel or DataParallel",
    "_orig_mod": "torch.compile",
    "base_model": "peft",
}
"""Modules that wrap a model, by the component that they put before the names."""


def describe(names: Iterable[str], own: Collection[str]) -> str:
    """Return a clause about names that do not fit a model: whose they are, and the remedy.

    Args:
        names: the names in the file.
        own: the names of the model's tensors.
    """
    names = list(names)
    for count in (1, 2, 3):
        prefixes = {".".join(name.split(".")[:count]) + "." for name in names}
        if len(prefixes) == 1 and any(name[len(prefix) :] in own for prefix in prefixes for name in names):
            (prefix,) = prefixes
            wrapper = WRAPPERS.get(prefix.split(".")[0], "the module around the model")
            return f"all names begin with {prefix!r}, of {wrapper}: save the state dict of the model inside"
    for pattern, library in LIBRARIES:
        if any(re.match(pattern, name) for name in names):
            return (
                f"the names are those of {library}: convert the file to Transformers' names, or load a checkpoint that "
                "is converted, such as those of openmmlab on the Hub"
            )
    return "it belongs to another model, or to another configuration"
