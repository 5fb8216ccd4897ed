"""The heads of Transformers' BEiT, accelerated; Data2Vec's are copies of them.

Transformers 4 and 5 name the modules and the convolution's class differently. Transformers 4 calls the branches of the
pyramid pooling, and their modules, in plain lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.models.beit import modeling_beit as theirs

from fastuper.models.heads.conv_module import FusedConv
from fastuper.models.heads.pooling import BranchParts, PooledCells
from fastuper.models.heads.upernet import UperNetSteps
from fastuper.patch.accelerated import MODELS, Accelerated, KnownModel, why_not_fusible

IS_OF_5 = hasattr(theirs, "BeitConvLayer")
"""Whether the modules have the names of Transformers 5."""


class ConvParts(Accelerated, FusedConv):
    """A convolution, BatchNorm and ReLU, in one step."""

    if IS_OF_5:

        @property
        def conv(self) -> Any:
            """The convolution."""
            return self.convolution

        @property
        def batch_norm(self) -> Any:
            """The norm."""
            return self.normalization

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            """Map (B, C_in, H, W) to (B, C, H, W)."""
            return FusedConv.forward(self, hidden_states)

    else:

        @property
        def batch_norm(self) -> Any:
            """The norm."""
            return self.bn

        def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[misc]
            """Map (B, C_in, H, W) to (B, C, H, W)."""
            return FusedConv.forward(self, input)

    def why_not(self) -> str:
        """See `Accelerated.why_not`."""
        return why_not_fusible(self)


class PoolingParts(Accelerated, BranchParts):
    """A branch of the pyramid pooling."""

    def parts(self) -> list[Any]:
        """Return the pooling and the convolution."""
        return [self.pooling, self.conv] if IS_OF_5 else list(self.layers)


class PoolingSteps(Accelerated, PooledCells):
    """The pyramid pooling."""

    def branches(self) -> list[Any]:
        """Return the branches."""
        return list(self.blocks)

    def called(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the result of each branch, called as a module."""
        return [branch(x, size=x.shape[2:]) for branch in self.branches()] if IS_OF_5 else super().called(x)

    if IS_OF_5:

        def forward(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
            """Return each branch's result for a map (B, C, H, W), resampled to its size: (B, hidden_size, H, W)."""
            return PooledCells.forward(self, hidden_states)


class HeadSteps(Accelerated, UperNetSteps):
    """UPerNet's head."""

    feature_norms = None

    if IS_OF_5:

        @property
        def bottleneck(self) -> Any:
            """The convolution that fuses the pyramid pooling."""
            return self.psp_bottleneck

    is_container = True

    def forward(self, encoder_hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return logits (B, num_labels, H, W) at the size of the finest of the maps (B, hidden_size, H_l, W_l)."""
        # The model returns these logits; without the copy they would be in channels_last.
        return UperNetSteps.forward(self, encoder_hidden_states).contiguous()


if IS_OF_5:

    class BeitConvLayer(ConvParts, theirs.BeitConvLayer, replaces=theirs.BeitConvLayer):
        """A convolution, BatchNorm and ReLU, in one step."""

else:

    class BeitConvModule(ConvParts, theirs.BeitConvModule, replaces=theirs.BeitConvModule):
        """A convolution, BatchNorm and ReLU, in one step."""


class BeitPyramidPoolingBlock(PoolingParts, theirs.BeitPyramidPoolingBlock, replaces=theirs.BeitPyramidPoolingBlock):
    """A branch of the pyramid pooling."""

    forward = theirs.BeitPyramidPoolingBlock.forward


class BeitPyramidPoolingModule(PoolingSteps, theirs.BeitPyramidPoolingModule, replaces=theirs.BeitPyramidPoolingModule):
    """The pyramid pooling."""


class BeitUperHead(HeadSteps, theirs.BeitUperHead, replaces=theirs.BeitUperHead):
    """UPerNet's head."""


MODELS.append(
    KnownModel(
        "Transformers' BeitForSemanticSegmentation",
        theirs.BeitForSemanticSegmentation,
        "decode_head",
        theirs.BeitUperHead,
    )
)
