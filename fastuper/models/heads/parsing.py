"""The heads of Unified Perceptual Parsing (https://arxiv.org/abs/1807.10221): five tasks over one feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastuper.data.parsing_labels import known_tasks
from fastuper.models.heads import strips
from fastuper.models.heads.conv_module import ConvModule, classify
from fastuper.models.heads.pyramid import PyramidHead
from fastuper.models.untouched import is_exactly

if TYPE_CHECKING:
    from fastuper.models.parsing_configuration import UnifiedPerceptualParsingConfig


class TaskHead(nn.Module):
    """A 3x3 convolution with BatchNorm and ReLU, and a classifier: the head of objects, of parts and of materials.

    Args:
        dim: channels of the map that the head reads, and of its convolution.
        classes: channels of the logits.
    """

    classifier: Any  # a convolution, or a user's module

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.conv = ConvModule(dim, dim, 3)
        self.classifier = nn.Conv2d(dim, classes, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, dim, H, W) to logits (B, classes, H, W)."""
        return classify(self.classifier, self.conv(x))


class SceneHead(TaskHead):
    """A 3x3 convolution with BatchNorm and ReLU, the mean over the map, and a classifier; see `TaskHead`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, dim, H, W) to logits (B, classes)."""
        return classify(self.classifier, self.conv(x).mean((2, 3), keepdim=True)).flatten(1)


class TextureHead(nn.Module):
    """Two 3x3 convolutions with BatchNorm and ReLU, and a classifier.

    The official code has no texture head, and the paper does not give the number of its convolutions.

    Args:
        dim_in: channels of the backbone's finest feature map.
        dim: channels of both convolutions.
        classes: channels of the logits.
    """

    classifier: Any  # a convolution, or a user's module

    def __init__(self, dim_in: int, dim: int, classes: int):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(dim_in, dim, 3), ConvModule(dim, dim, 3))
        self.classifier = nn.Conv2d(dim, classes, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, dim_in, H, W) to logits (B, classes, H, W)."""
        return classify(self.classifier, self.convs(x))


class ParsingHead(PyramidHead):
    """A feature pyramid with a head for each task; a task reads the level that suits it.

    Scenes are classified from the coarsest level, objects and parts from the fusion of all levels, materials from the
    finest level. Textures are classified from the backbone's finest feature map, and their gradient stops there.

    Args:
        config: `hidden_size`, `pool_scales`, `pool_channels`, `pooling`, `resample_first`, `tasks`, `texture_channels`
            and `num_channels_of`.
        in_channels: channels of the backbone's feature maps, finest first; two or more.

    Raises:
        ValueError: there are fewer than two feature maps, or there is no such pooling.
    """

    scene_head: Any
    object_head: Any
    part_head: Any
    material_head: Any
    texture_head: Any

    def __init__(self, config: UnifiedPerceptualParsingConfig, in_channels: Sequence[int]):
        if len(in_channels) < 2:
            raise ValueError(f"the parsing head reads two or more feature maps, got in_channels={list(in_channels)}")
        super().__init__(
            in_channels,
            config.hidden_size,
            config.pool_scales,
            pool_channels=config.pool_channels,
            pooling=config.pooling,
            resample_first=config.resample_first,
        )
        self.config = config
        self.tasks = tuple(config.tasks)
        for task in self.tasks:
            classes = config.num_channels_of(task)
            if task == "texture":
                head: nn.Module = TextureHead(self.in_channels[0], config.texture_channels, classes)
            else:
                head = (SceneHead if task == "scene" else TaskHead)(config.hidden_size, classes)
            self.add_module(f"{task}_head", head)

    def forward(
        self, feature_maps: Sequence[torch.Tensor], tasks: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the logits of each task before softmax, by name, in the order of the configuration's tasks.

        Only what the tasks need runs: scenes alone need no top-down path, materials alone no fusion, textures alone
        not even the pyramid pooling.

        Args:
            feature_maps: (B, C_l, H_l, W_l) for each level, finest first; of a backbone at strides 4, 8, 16, 32.
            tasks: the tasks to run; None for all tasks of the head.

        Returns:
            scene: (B, classes); object, part, material, texture: (B, classes, H, W) at the first map's size. The
            classes of parts are the parts of all objects, one object after the other.

        Raises:
            ValueError: there is no such task or head; the number of maps, or of their channels, does not fit
                the modules that read them.
        """
        tasks = self.tasks if tasks is None else known_tasks(tasks, self.tasks)
        self.check(feature_maps)
        logits: dict[str, torch.Tensor] = {}
        pooled: Any = None if tasks == ("texture",) else self.psp_forward(feature_maps)
        if "scene" in tasks:
            logits["scene"] = self.scene_head(pooled)
        outputs = self.outputs(tasks)
        if strips.apply_to(self, feature_maps, outputs):
            return logits | strips.run(self, feature_maps, pooled, outputs)
        if "object" in tasks or "part" in tasks:
            levels = self.smooth(self.top_down(feature_maps[:-1], pooled))
            fused, finest = self.fuse(levels), levels[0]
        elif "material" in tasks:
            finest = self.fpn_convs[0](self.top_down(feature_maps[:-1], pooled)[0])
        if "object" in tasks:
            logits["object"] = self.object_head(fused)
        if "part" in tasks:
            logits["part"] = self.part_head(fused)
        if "material" in tasks:
            logits["material"] = self.material_head(finest)
        if "texture" in tasks:
            logits["texture"] = self.texture_head(feature_maps[0].detach())
        return logits

    def outputs(self, tasks: Sequence[str]) -> dict[str, strips.Output]:
        """Return what tasks compute at the finest level, for the executor in strips; nothing if a head is touched."""
        reads = {"object": "fused", "part": "fused", "material": "finest", "texture": "map"}
        found = {}
        for task in reads:
            if task not in tasks:
                continue
            head = getattr(self, f"{task}_head")
            if is_exactly(head, TextureHead) and is_exactly(head.convs, nn.Sequential):
                convs = tuple(head.convs)
            elif is_exactly(head, TaskHead):
                convs = (head.conv,)
            else:
                return {}
            found[task] = strips.Output(reads[task], convs, head.classifier)
        return found
