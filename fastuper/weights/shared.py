"""Weights that two models share: the backbone's and the feature pyramid's, copied from one model to the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastuper.io.messages import listed
from fastuper.weights.errors import CheckpointError

SHARED = tuple(
    f"{part}."
    for part in (
        "backbone",
        "decode_head.psp_modules",
        "decode_head.bottleneck",
        "decode_head.lateral_convs",
        "decode_head.fpn_convs",
        "decode_head.fpn_bottleneck",
    )
)
"""The beginnings of the names of shared tensors: those of the backbone and the pyramid, not those of classifiers."""


COUNTS = ("num_batches_tracked", "relative_position_index")
"""Ends of the names of buffers that no result depends on, or that follow from the configuration."""


@dataclass(frozen=True)
class SharedWeights:
    """The result of `copy_shared_weights`: names of tensors, in the order of their model.

    Attributes:
        copied: tensors that the target now has from the source.
        kept: tensors of the target that did not change.
        unused: tensors of the source that were not copied.
    """

    copied: tuple[str, ...]
    kept: tuple[str, ...]
    unused: tuple[str, ...]


@torch.no_grad()
def copy_shared_weights(source: nn.Module, target: nn.Module) -> SharedWeights:
    """Copy the backbone's and the pyramid's tensors of one model into another, where both have them.

    It serves `UperNetForSemanticSegmentation` and `UperNetForUnifiedPerceptualParsing`, in either direction. Both name
    these modules alike. With the pooling and the order of the official parsing code (`pooling="precise_roi"`,
    `resample_first=True`) equal weights do not give equal maps.

    Args:
        source: the model to copy from.
        target: the model to copy into, in its own dtype and on its own device.

    Returns:
        The names of the tensors that were copied, and of those that were not.

    Raises:
        CheckpointError: no tensor fits, a shared tensor has another shape, or a part (the backbone, the pooling, ...)
            has other tensors in both models; the target does not change.
    """
    theirs, ours = source.state_dict(), target.state_dict()
    common = [name for name in ours if name.startswith(SHARED) and name in theirs]
    if not common:
        raise CheckpointError(
            f"{type(source).__name__} and {type(target).__name__} share no tensors of a backbone or pyramid: "
            f"the names are {listed(theirs)} and {listed(ours)}"
        )
    if other := [name for name in common if theirs[name].shape != ours[name].shape]:
        name = other[0]
        raise CheckpointError(
            f"{len(other)} shared tensors differ in shape, such as {name}: {tuple(theirs[name].shape)} in the source, "
            f"{tuple(ours[name].shape)} in the target; both need the same backbone, hidden_size, pool_channels and "
            "pool_scales"
        )
    for part in SHARED:
        both = [
            {name for name in names if name.startswith(part) and not name.endswith(COUNTS)} for names in (theirs, ours)
        ]
        if all(both) and both[0] != both[1] and both[0] & both[1]:
            other = sorted(both[0] ^ both[1])
            raise CheckpointError(
                f"{part[:-1]} is not the same network in both models: {len(other)} tensors are in one of them alone, "
                f"such as {listed(other, 2)}; both need the same backbone and pool_scales"
            )
    for name in common:
        ours[name].copy_(theirs[name])
    copied = set(common)
    return SharedWeights(
        tuple(common), tuple(name for name in ours if name not in copied), tuple(n for n in theirs if n not in copied)
    )
