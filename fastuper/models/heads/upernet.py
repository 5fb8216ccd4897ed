"""UPerNet's head for semantic segmentation (https://arxiv.org/abs/1807.10221): from feature maps to logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastuper.models.backbones.layers import LayerNorm2d
from fastuper.models.heads import strips
from fastuper.models.heads.conv_module import classify
from fastuper.models.heads.pyramid import PyramidHead, PyramidSteps

if TYPE_CHECKING:
    from fastuper.models.upernet_configuration import UperNetConfig


class UperNetSteps(PyramidSteps):
    """The head's forward: the base of `UperNetHead`, and of other libraries' heads.

    Attributes:
        classifier: a convolution, or a user's module.
        feature_norms: a module for each feature map; None for none.
    """

    classifier: Any
    feature_norms: Any

    def forward(self, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return logits (B, num_labels, H, W) at the first map's size.

        Args:
            feature_maps: (B, C_l, H_l, W_l) for each level, finest first; of a backbone at strides 4, 8, 16, 32.

        Raises:
            ValueError: the number of maps, or of their channels, does not fit the modules that read them.
        """
        return self.segment(feature_maps, self.outputs(), self.classify)

    def segment(
        self,
        feature_maps: Sequence[torch.Tensor],
        outputs: strips.Outputs,
        classify: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Run the steps, with `classify` as the last.

        Args:
            feature_maps: as for `forward`.
            outputs: for the executor in strips: one output, "logits", which is `classify`; none if it must be called.
            classify: returns the logits (B, num_labels, H, W) of the fused levels (B, hidden_size, H, W).
        """
        self.check(feature_maps)
        if self.feature_norms is not None:
            feature_maps = [norm(x) for norm, x in zip(self.feature_norms, feature_maps, strict=True)]
        pooled = self.psp_forward(feature_maps)
        if strips.apply_to(self, feature_maps, outputs):
            return strips.run(self, feature_maps, pooled, outputs)["logits"]
        levels = self.smooth(self.top_down(feature_maps[:-1], pooled))
        return classify(self.fuse(levels))

    def outputs(self) -> dict[str, strips.Output]:
        """Return what the head computes at the finest level, for the executor in strips."""
        return {"logits": strips.Output("fused", (), self.classifier)}

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, num_labels, H, W) of the fused levels (B, hidden_size, H, W)."""
        return classify(self.classifier, x)


class UperNetHead(UperNetSteps, PyramidHead):
    """A feature pyramid with pyramid pooling on top; all levels are fused at the finest size and classified.

    Args:
        config: `hidden_size`, `pool_scales`, `num_labels`, `align_corners` and `feature_norms`.
        in_channels: channels of the backbone's feature maps, finest first.

    Attributes:
        feature_norms: a LayerNorm of each feature map, over its channels; None if `config.feature_norms` is False.
    """

    def __init__(self, config: UperNetConfig, in_channels: Sequence[int]):
        classifier = nn.Conv2d(config.hidden_size, config.num_labels, kernel_size=1)
        super().__init__(in_channels, config.hidden_size, config.pool_scales, classifier=classifier)
        self.config = config
        self.align_corners = self.psp_modules.align_corners = config.align_corners
        norms = (LayerNorm2d(channels, eps=1e-6) for channels in in_channels)
        self.feature_norms = nn.ModuleList(norms) if config.feature_norms else None
