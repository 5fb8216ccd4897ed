"""Transformers' UPerNet, accelerated: its heads, and the model, whose auxiliary head runs only for a loss."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.models.upernet import modeling_upernet as theirs

from fastuper.models.heads.conv_module import FusedConv
from fastuper.models.heads.pooling import BranchParts, PooledCells
from fastuper.models.heads.upernet import UperNetSteps
from fastuper.models.outputs import Deferred, SemanticSegmenterOutput, known_to_transformers
from fastuper.models.untouched import is_hooked_inside
from fastuper.models.upernet import full_size
from fastuper.patch.accelerated import MODELS, Accelerated, KnownModel, why_not_fusible
from fastuper_kernels import upsample_cross_entropy
from fastuper_kernels.dispatch.modes import is_eager
from fastuper_kernels.dispatch.torch_private import in_ddp

TAKES_MORE = "kwargs" in inspect.signature(theirs.UperNetForSemanticSegmentation.forward).parameters
"""Whether the model takes, and ignores, other keywords. The Trainer reads the signature: a model that takes other
keywords gets the number of labels of a step, and divides its loss by it where gradients are accumulated."""


class UperNetConvModule(Accelerated, FusedConv, theirs.UperNetConvModule, replaces=theirs.UperNetConvModule):
    """A convolution, BatchNorm and ReLU, in one step."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, H, W)."""
        return FusedConv.forward(self, input)

    def why_not(self) -> str:
        """See `Accelerated.why_not`."""
        return why_not_fusible(self)


class UperNetPyramidPoolingBlock(
    Accelerated, BranchParts, theirs.UperNetPyramidPoolingBlock, replaces=theirs.UperNetPyramidPoolingBlock
):
    """A branch of the pyramid pooling. Transformers calls the modules in its list `layers`, not its children."""

    def parts(self) -> list[nn.Module]:
        """Return the modules in the list."""
        return list(self.layers)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, channels, s, s)."""
        return theirs.UperNetPyramidPoolingBlock.forward(self, input)


class UperNetPyramidPoolingModule(
    Accelerated, PooledCells, theirs.UperNetPyramidPoolingModule, replaces=theirs.UperNetPyramidPoolingModule
):
    """The pyramid pooling. Transformers calls the modules in its list `blocks`, not its children."""

    def branches(self) -> list[nn.Module]:
        """Return the modules in the list."""
        return list(self.blocks)


class UperNetHead(Accelerated, UperNetSteps, theirs.UperNetHead, replaces=theirs.UperNetHead):
    """UPerNet's head."""

    feature_norms = None

    is_container = True

    def forward(self, encoder_hidden_states: Any) -> torch.Tensor:
        """Map feature maps (B, C_l, H_l, W_l), finest first, to logits (B, num_labels, H_1, W_1)."""
        return UperNetSteps.forward(self, encoder_hidden_states)


class UperNetFCNHead(Accelerated, theirs.UperNetFCNHead, replaces=theirs.UperNetFCNHead):
    """The auxiliary head; its convolutions are faster, and the model runs it only for a loss."""

    is_container = True


class UperNetForSemanticSegmentation(
    Accelerated, theirs.UperNetForSemanticSegmentation, replaces=theirs.UperNetForSemanticSegmentation
):
    """The model: without labels no auxiliary head, with labels no logits at full size unless they are read."""

    is_container = True

    if TAKES_MORE:

        def forward(
            self,
            pixel_values: torch.Tensor | None = None,
            output_attentions: bool | None = None,
            output_hidden_states: bool | None = None,
            labels: torch.Tensor | None = None,
            return_dict: bool | None = None,
            **kwargs: Any,
        ) -> tuple[Any, ...] | SemanticSegmenterOutput:
            """See `segmented`; the other keywords are not read."""
            return segmented(self, pixel_values, output_attentions, output_hidden_states, labels, return_dict)

    else:

        def forward(  # type: ignore[misc]
            self,
            pixel_values: torch.Tensor | None = None,
            output_attentions: bool | None = None,
            output_hidden_states: bool | None = None,
            labels: torch.Tensor | None = None,
            return_dict: bool | None = None,
        ) -> tuple[Any, ...] | SemanticSegmenterOutput:
            """See `segmented`."""
            return segmented(self, pixel_values, output_attentions, output_hidden_states, labels, return_dict)


def segmented(
    model: Any,
    pixel_values: torch.Tensor | None,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    labels: torch.Tensor | None,
    return_dict: bool | None,
) -> tuple[Any, ...] | SemanticSegmenterOutput:
    """Segment images, as `transformers.UperNetForSemanticSegmentation.forward` does.

    It is no method: a wrapper of the accelerated `forward` may stay on a model that was restored.

    Args:
        model: the model, accelerated or restored.
        pixel_values: (B, C, H, W), floating point, normalised.
        output_attentions: whether to return the attention weights; the configuration's value if None.
        output_hidden_states: whether to return the backbone's hidden states; the configuration's value if None.
        labels: (B, H, W), integers in [0, num_labels) or `config.loss_ignore_index`.
        return_dict: whether to return an output object (True) or its tuple; the configuration's value if None.

    Returns:
        The fields of Transformers' `SemanticSegmenterOutput`. If labels are given, `logits` are computed when they
        are first read. If all labels are ignored, the loss is 0 (Transformers: NaN).

    Raises:
        ValueError: labels are given, and the model has one class, or they are not (B, H, W).
    """
    if labels is not None and model.config.num_labels == 1:
        raise ValueError("The number of labels should be greater than one")
    config = model.config
    if return_dict is None:
        return_dict = config.return_dict and not getattr(config, "torchscript", False)
    outputs = model.backbone.forward_with_filtered_kwargs(
        pixel_values,
        output_hidden_states=config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        output_attentions=config.output_attentions if output_attentions is None else output_attentions,
    )
    assert pixel_values is not None  # the backbone has read it
    size, features = pixel_values.shape[2:], outputs.feature_maps
    if labels is not None and labels.shape != (len(pixel_values), *size):
        raise ValueError(
            f"labels must be (B, H, W) of the images, {(len(pixel_values), *size)}, got {tuple(labels.shape)}"
        )
    coarse = model.decode_head(features)
    loss = None
    if labels is not None:
        loss = _cross_entropy(coarse, labels, config)
        if model.auxiliary_head is not None:
            auxiliary = _cross_entropy(model.auxiliary_head(features), labels, config)
            loss = loss + config.auxiliary_loss_weight * auxiliary
    elif model.auxiliary_head is not None and is_hooked_inside(model.auxiliary_head):
        model.auxiliary_head(features)  # for its hooks

    logits: Any = None
    if loss is not None and return_dict and is_eager() and not in_ddp():
        logits = Deferred(partial(full_size, coarse, size), coarse.device.type)
    else:
        logits = full_size(coarse, size)
    if return_dict:
        kind = known_to_transformers(SemanticSegmenterOutput)
        return kind(loss, logits, outputs.hidden_states, outputs.attentions)
    output = (logits, *(outputs[1:] if output_hidden_states else outputs[2:]))
    return output if loss is None else (loss, *output)


def _cross_entropy(coarse: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    """Return the mean cross entropy of logits (B, num_labels, h, w), resampled to the labels' size (H, W)."""
    return upsample_cross_entropy(coarse, labels, ignore_index=config.loss_ignore_index)


MODELS.append(
    KnownModel(
        "Transformers' UperNetForSemanticSegmentation",
        theirs.UperNetForSemanticSegmentation,
        "decode_head",
        theirs.UperNetHead,
    )
)
