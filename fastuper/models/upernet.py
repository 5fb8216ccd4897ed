"""UPerNet, with the interface of Transformers' `UperNetForSemanticSegmentation`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.io.messages import listed
from fastuper.models.backbones import Backbone
from fastuper.models.backbones.foreign import pretrained_transformers_backbone
from fastuper.models.backbones.registry import checkpoint_names
from fastuper.models.cuda_graph import CapturedFunction
from fastuper.models.heads.fcn import FCNHead
from fastuper.models.heads.upernet import UperNetHead
from fastuper.models.inputs import TargetSizes, check_labels, check_pixels, check_target_sizes
from fastuper.models.memory import within_memory
from fastuper.models.norms import warn_once
from fastuper.models.outputs import Deferred, SemanticSegmenterOutput, known_to_transformers
from fastuper.models.pyramid_model import PyramidModel, check_finite
from fastuper.models.untouched import is_exactly, is_hooked_inside, is_untouched
from fastuper.models.upernet_configuration import UperNetConfig, named_backbone_config, upernet_config_from
from fastuper.weights.errors import CheckpointError
from fastuper.weights.reading import read_weights
from fastuper.weights.transformers import OUTPUT_NORMS, backbone_state_dict
from fastuper_kernels import upsample_argmax, upsample_cross_entropy
from fastuper_kernels.cpu import matrices
from fastuper_kernels.dispatch.modes import for_all_sizes, is_autocast, is_eager, written_for
from fastuper_kernels.dispatch.torch_private import in_ddp
from fastuper_kernels.ops.upsample_argmax import label_dtype
from fastuper_kernels.ops.upsample_cross_entropy import as_two_classes


class UperNetForSemanticSegmentation(PyramidModel):
    """UPerNet over a ConvNeXt, Swin or ResNet backbone (or one of timm's or Transformers').

    The same network as `transformers.UperNetForSemanticSegmentation`: its configurations, checkpoints, outputs and
    losses. These are the differences (docs/differences.md lists all):

    - the auxiliary head runs only when labels are given;
    - with labels, full-size logits are computed only when they are read. Labels may have another size than the images.
      If all labels are ignored, the loss is 0. A model of one class is trained with binary cross entropy;
    - a batch of one image can be trained on: BatchNorm over a single cell uses its running statistics;
    - images may have any size from 1 x 1; Swin's absolute position embeddings are resampled to it;
    - a backbone configuration that names no stages returns all of them;
    - Swin's hidden states are maps (B, C, H, W), as in Transformers 5 (4.x: (B, L, C)). Attentions are returned
      whenever `output_attentions` is set (5.x: only with eager attention; with `return_dict=False`, never alone).

    Args:
        config: a `UperNetConfig`, of this library or of Transformers.
        backbone: a module that is the backbone, if the configuration is that of a model of `over`; otherwise None.

    Attributes:
        backbone: its `forward(pixel_values)` returns `feature_maps`.
        neck: makes levels of the maps of a vision transformer of timm or Transformers; None for other backbones.
        decode_head: the UPerNet head, from feature maps to logits at stride 4.
        auxiliary_head: the auxiliary head; None if `config.use_auxiliary_head` is False.
        align_corners: of the resampling (bilinear) of logits, the auxiliary head's too, to the images' or labels' size.
    """

    config_class = UperNetConfig

    @classmethod
    def _config_from(cls, config: Any) -> UperNetConfig:
        return upernet_config_from(config)

    @within_memory
    def __init__(self, config: UperNetConfig | Any, backbone: nn.Module | None = None):
        super().__init__()
        given = upernet_config_from(config)
        self.config = _with_backbone_config(given)
        channels = self._add_backbone(backbone)
        self.decode_head = UperNetHead(self.config, channels)
        self.auxiliary_head = FCNHead(self.config, channels) if self.config.use_auxiliary_head else None
        self.align_corners = self.config.aligns_output
        self._complete()
        if given.use_pretrained_backbone:
            self._load_backbone(given)

    @for_all_sizes
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        output_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **unused: Any,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """Segment images.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised; any size.
            output_attentions: whether to return the attention weights; the configuration's value if None.
            output_hidden_states: whether to return the backbone's hidden states; the configuration's value if None.
            labels: (B, H, W), integers in [0, num_labels) or `config.loss_ignore_index`, of the images' size or
                another; with labels the output has a loss. For one class: 1 on the object, 0 elsewhere. If a classifier
                was replaced, its number of classes counts, not `config.num_labels`.
            return_dict: whether to return an output object (True) or its tuple; the configuration's value if None.
            output_logits: True to compute the logits at once, False to leave them out. If None they are in the output.
                With labels they are then computed when they are first read; but at once in a tuple, under
                DistributedDataParallel and under a tracer.
            num_items_in_batch: the divisor of the sum of the pixels' losses, an integer or a scalar tensor. Where
                several batches make one step, it is the number of pixels with a class in all of them. If None, the
                number in this batch.
            **unused: other values of a batch, which are not read, as in Transformers 5. A warning names them once.

        Returns:
            `SemanticSegmenterOutput`. `loss` is the mean cross entropy of the logits, resampled to the labels' size,
            over the pixels that are not ignored. An auxiliary head adds `auxiliary_loss_weight` times its own mean. The
            loss has the logits' dtype (float32 under autocast). `logits` are (B, num_labels, H, W), contiguous.

        Raises:
            TypeError: pixels or labels are not tensors.
            ValueError: pixels or labels have a wrong shape, dtype or range; the message says what was expected.
        """
        config = self.config
        if unused and not torch.compiler.is_compiling():
            warn_once(f"forward does not read {', '.join(unused)}")
        pixel_values = check_pixels(pixel_values)
        if labels is not None:
            labels = check_labels(labels, pixel_values.shape[0], self._classes(), config.loss_ignore_index)
        elif num_items_in_batch is not None:
            raise ValueError("num_items_in_batch divides the loss: give labels too")
        output_attentions, output_hidden_states, return_dict = self._returned(
            output_attentions, output_hidden_states, return_dict
        )

        size = pixel_values.shape[2:]
        maps, hidden_states, attentions = self._features(pixel_values, output_hidden_states, output_attentions)
        coarse = self._cropped(self.decode_head(maps), size, self.align_corners)
        loss = None if labels is None else self._loss(coarse, maps, size, labels, num_items_in_batch)
        if labels is None and self.auxiliary_head is not None and is_hooked_inside(self.auxiliary_head):
            self.auxiliary_head(maps)  # for its hooks
        del maps  # their memory is free while the logits are resampled to full size

        logits: Any = None
        if output_logits is None and loss is not None and return_dict and is_eager() and not in_ddp():
            logits = Deferred(partial(self._full_size, coarse, size), coarse.device.type)
        elif output_logits is not False:
            logits = self._full_size(coarse, size)
        output = known_to_transformers(SemanticSegmenterOutput)(loss, logits, hidden_states, attentions)
        return output if return_dict else output.to_tuple()

    @for_all_sizes
    @torch.no_grad()
    def segment(
        self, pixel_values: torch.Tensor, target_sizes: TargetSizes = None, *, dtype: torch.dtype | None = torch.int64
    ) -> list[torch.Tensor]:
        """Return the label map of each image: `forward`, then the processor's `post_process_semantic_segmentation`.

        The mode of the model does not change: call `eval()` first.

        Args:
            pixel_values: (B, C, H, W), as for `forward`.
            target_sizes: (height, width) of each label map, one an image; the images' own size if None. As in
                Transformers, logits are resampled to the images' size and then to this one, by the processor's rule
                (align_corners=False).
            dtype: the integer dtype of the label maps; None for the smallest that holds the classes (uint8, uint16 or
                int32), which takes an eighth or a quarter of int64's memory.

        Returns:
            B label maps, each (height, width), int64 as in Transformers, or of `dtype`. For one class: 1 where its
            logit is above 0, and 0 elsewhere.

        Raises:
            TypeError: the pixels are not a tensor, or `dtype` is no `torch.dtype`.
            ValueError: `target_sizes` are not one pair an image of integers from 1; `dtype` is no integer dtype or too
                small for the classes; pixels or logits are not finite.
        """
        pixel_values = check_pixels(pixel_values)
        targets = check_target_sizes(target_sizes, pixel_values)
        size = (pixel_values.shape[2], pixel_values.shape[3])
        logits = as_two_classes(self._coarse_logits(pixel_values))
        dtype = dtype or label_dtype(logits.shape[1])
        if logits.is_cuda and all(target == targets[0] for target in targets):  # in one launch
            labels = list(self._label_maps(logits, size, targets[0], dtype))
        else:
            labels = [
                self._label_maps(image, size, target, dtype)[0]
                for image, target in zip(logits.split(1), targets, strict=True)
            ]
        check_finite([logits], [pixel_values])  # the last step: all work is launched before the host waits for a GPU
        return labels

    def capture(self, pixel_values: torch.Tensor, target_size: tuple[int, int] | None = None) -> CapturedFunction:
        """Record the model's work on images of one shape as a CUDA graph, and return a function that replays it.

        Args:
            pixel_values: (B, C, H, W) on a GPU: an example of the images.
            target_size: (height, width): the function then returns label maps (B, height, width), int64, of this size.
                If None it returns logits (B, num_labels, H, W).

        Raises:
            ValueError: `pixel_values` are not on a GPU, or have a wrong shape or dtype.
        """
        pixel_values = check_pixels(pixel_values)
        size = (pixel_values.shape[2], pixel_values.shape[3])

        def logits(x: torch.Tensor) -> torch.Tensor:
            return self(x, return_dict=True).logits

        def labels(x: torch.Tensor) -> torch.Tensor:
            assert target_size is not None
            coarse = as_two_classes(self._coarse_logits(x))
            return self._label_maps(coarse, size, (target_size[0], target_size[1]), torch.int64)

        return CapturedFunction(self, logits if target_size is None else labels, pixel_values)

    def _coarse_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits at the size of the finest feature map; of padded images, at the images' size."""
        maps, _, _ = self._features(pixel_values, False, False)
        return self._cropped(self.decode_head(maps), pixel_values.shape[2:], self.align_corners)

    def _full_size(self, coarse: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Return logits (B, num_labels, h, w) resampled to `size`, contiguous."""
        return full_size(coarse, size, self.align_corners)

    def _label_maps(
        self, coarse: torch.Tensor, size: tuple[int, int], target: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return label maps (B, *target) of logits (B, classes, h, w): resampled to the images' size, then to target.

        The first step is the network's, the second the image processor's.
        """
        if target == size:
            return upsample_argmax(coarse, [size], dtype=dtype, align_corners=self.align_corners)
        return upsample_argmax(coarse, [size, target], dtype=dtype, align_corners=[self.align_corners, False])

    def _classes(self) -> dict[str, int]:
        """Return the number of classes of each head, by its name; without a head whose number only its logits show."""
        heads = {"decode_head": self.decode_head, "auxiliary_head": self.auxiliary_head}
        return {
            name: head.classifier.out_channels
            for name, head in heads.items()
            if isinstance(head, UperNetHead | FCNHead) and is_untouched(head) and is_exactly(head.classifier, nn.Conv2d)
        }

    def _loss(
        self,
        coarse: torch.Tensor,
        maps: Any,
        size: torch.Size,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Return the loss of the head's logits at stride 4, plus that of the auxiliary head on the feature maps."""
        loss = self._cross_entropy(coarse, labels, num_items_in_batch)
        if self.auxiliary_head is None:
            return loss
        auxiliary = self._cropped(self.auxiliary_head(maps), size, self.align_corners)
        auxiliary_loss = self._cross_entropy(auxiliary, labels, num_items_in_batch)
        return loss + self.config.auxiliary_loss_weight * auxiliary_loss

    def _cross_entropy(
        self, coarse: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Return the cross entropy of logits (B, num_labels, h, w), resampled to the labels' size (H, W)."""
        options = {"ignore_index": self.config.loss_ignore_index, "align_corners": self.align_corners}
        if num_items_in_batch is None:
            return upsample_cross_entropy(coarse, labels, **options)
        # The loss is computed in float32: the sum over an image can exceed the largest number of float16.
        wide = coarse.to(torch.promote_types(coarse.dtype, torch.float32))
        total = upsample_cross_entropy(wide, labels, reduction="sum", **options)
        count = torch.as_tensor(num_items_in_batch, device=total.device)
        loss = total / (count + (count == 0))  # 0 if all pixels are ignored, as without the argument
        return loss if is_autocast(total.device.type) else loss.to(coarse.dtype)

    def _load_backbone(self, config: UperNetConfig) -> None:
        """Load the weights of the backbone that a configuration names, usually a classifier's weights."""
        assert config.backbone is not None  # the configuration has checked it
        if config.use_timm_backbone:
            # timm has loaded them already. A saved model has its own weights, and must not fetch timm's.
            self.config.backbone_config.values["use_pretrained_backbone"] = False
            return
        if self.device.type == "meta":  # from_pretrained loads a checkpoint with all weights next
            return
        if not isinstance(self.backbone, Backbone):
            self.backbone = pretrained_transformers_backbone(self.backbone, config.backbone)
            return
        weights, _ = read_weights(config.backbone)
        model_type = self.backbone.config.model_type
        names = checkpoint_names(model_type)
        weights = backbone_state_dict(weights, model_type, names)
        own = self.backbone.state_dict()
        if wrong := [name for name in weights if name in own and weights[name].shape != own[name].shape]:
            raise CheckpointError(
                f"{config.backbone} does not fit its configuration: {wrong[0]} has shape "
                f"{tuple(weights[wrong[0]].shape)}, and the backbone {tuple(own[wrong[0]].shape)}"
            )
        missing, unexpected = self.backbone.load_state_dict(weights, strict=False)
        # A classifier has no norms of the stages' outputs, and computed buffers have their values already.
        if not any(name.startswith(OUTPUT_NORMS) for name in weights):
            missing = [name for name in missing if not name.startswith(OUTPUT_NORMS)]
        missing = [name for name in missing if not names.is_computed(name)]
        if missing or unexpected:
            raise CheckpointError(
                f"{config.backbone} does not fit its configuration: it lacks {len(missing)} of the backbone's tensors "
                f"({listed(missing, 2)}), and has {len(unexpected)} that the backbone lacks ({listed(unexpected, 2)})"
            )

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether `transformers.Trainer` should pass `num_items_in_batch`; it counts the labels that are not -100."""
        return self.config.loss_ignore_index == -100


def full_size(coarse: torch.Tensor, size: Sequence[int], align_corners: bool = False) -> torch.Tensor:
    """Return logits (B, num_labels, h, w) resampled (bilinear) to `size`, contiguous."""
    # The head's logits are channels_last; resampled in that layout, they would have to be copied at full size.
    coarse = coarse.contiguous()
    if written_for() == "openvino" and not align_corners:
        return matrices.full_size(coarse, size)
    return F.interpolate(coarse, size=list(size), mode="bilinear", align_corners=align_corners).contiguous()


def _with_backbone_config(config: UperNetConfig) -> UperNetConfig:
    """Return the configuration; if it only names a backbone, a copy that holds that backbone's configuration.

    Transformers 5 makes the same copy, so that a saved model needs no file outside its own folder.
    """
    if config.backbone_config is not None:
        return config
    config = copy.deepcopy(config)
    config.backbone_config = named_backbone_config(config)
    config.backbone, config.backbone_kwargs = None, None
    config.use_timm_backbone, config.use_pretrained_backbone = False, False
    return config
