"""Names of tensors in the checkpoints of Hugging Face Transformers: state dict -> state dict.

Our modules have the names of the Hub's checkpoints, which Transformers 4.56 uses. Transformers 5 renames the tensors of
a Swin in memory, and writes the norm after its last stage, which UPerNet does not use. ConvNeXt and ResNet have the
same names in both versions. A family's names are in its file in `fastuper/models/backbones`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from fastuper.io.messages import listed
from fastuper.weights.errors import CheckpointError

T = TypeVar("T")
BACKBONE = "backbone."  # the backbone's prefix in a UPerNet
OUTPUT_NORMS = "hidden_states_norms."  # the norms of a backbone's returned maps, which a classifier lacks


@dataclass(frozen=True)
class Names:
    """The names of a backbone family's tensors in Transformers' checkpoints.

    Names here are relative to the backbone, without "backbone." and without `prefix`.

    Args:
        parts: first components of the backbone's names, such as "encoder". A classifier's checkpoint has other tensors
            besides: a final norm, a pooler, a classifier.
        prefix: the component that Transformers 5 puts before the names in memory, with its dot ("swin.").
        renamed: pairs of a regular expression and its replacement, from the names that Transformers 5 has in memory
            to the Hub's. The first expression that matches the beginning of a name is replaced.
        unused: beginnings of the names of tensors that UPerNet does not use.
        computed: ends of the names of buffers that follow from the configuration; a checkpoint may lack them.
    """

    parts: tuple[str, ...] = ()
    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()

    def is_computed(self, name: str) -> bool:
        """Return True if a tensor of this name follows from the configuration."""
        return name.endswith(self.computed)


def hub_name(name: str, names: Names) -> str | None:
    """Return the Hub's name for a tensor of a UPerNet, or None for a tensor that UPerNet does not use.

    Args:
        name: the tensor's name in a UPerNet of Transformers 4.x or 5.x, in memory or on disk.
        names: the names of its backbone's family.
    """
    if not name.startswith(BACKBONE):
        return name
    inside = name.removeprefix(BACKBONE)
    bare = inside.removeprefix(names.prefix)
    if bare != inside and bare.startswith(names.unused):
        return None
    return BACKBONE + _renamed(bare, names)


def adapter_key_mapping(names: Names) -> dict[str, str]:
    """Return {regular expression: replacement} from Transformers 5's names in memory to the Hub's.

    It is the argument `key_mapping` of `peft.PeftModel.from_pretrained`, which replaces the first expression that is
    found in a name. Adapters have the names of the modules in memory.
    """
    prefix = re.escape(BACKBONE + names.prefix)
    mapping = {f"^{prefix}{pattern}": BACKBONE + replacement for pattern, replacement in names.renamed}
    return {**mapping, f"^{prefix}": BACKBONE} if names.prefix else mapping


def backbone_state_dict(state_dict: Mapping[str, T], model_type: str, names: Names) -> dict[str, T]:
    """Return the backbone's part of a checkpoint of its family, with the names of our backbone module.

    Args:
        state_dict: of Transformers' image classifier, bare model, backbone or UPerNet.
        model_type: the family's, such as "swin".
        names: the family's.

    Returns:
        The same values without the classifier, the final norm and the pooler, their names without any prefix. The norms
        of a backbone's outputs (`hidden_states_norms`) are included only if the checkpoint has them.

    Raises:
        CheckpointError: the checkpoint has no backbone of this family, or has a tensor under two names.
    """
    weights: dict[str, T] = {}
    for name, value in state_dict.items():
        bare = name.removeprefix(BACKBONE).removeprefix(f"{model_type}.")
        if bare.split(".")[0] not in names.parts or bare.startswith(names.unused):
            continue
        ours = _renamed(bare, names)
        if ours in weights:
            raise CheckpointError(f"{ours} is in the checkpoint twice, once as {name}; remove one of them")
        weights[ours] = value
    if not weights:
        raise CheckpointError(f"these are not weights of a {model_type} model: their names are {listed(state_dict)}")
    return weights


def _renamed(name: str, names: Names) -> str:
    for pattern, replacement in names.renamed:
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    return name
