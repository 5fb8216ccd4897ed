"""UPerNet, with the interface of Transformers' `UperNetForSemanticSegmentation`."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from fastuper.models.backbones import Backbone, build_backbone
from fastuper.models.backbones.layers import initialize_tensor
from fastuper.models.backbones.registry import checkpoint_names
from fastuper.models.cuda_graph import Captured
from fastuper.models.gradient_checkpointing import Checkpointed, checkpointed
from fastuper.models.heads.fcn import FCNHead
from fastuper.models.heads.upernet import UperNetHead
from fastuper.models.outputs import Deferred, SemanticSegmenterOutput, known_to_transformers
from fastuper.models.pretrained import (
    PretrainedMixin,
    read_weights,
    rename_on_load,
)
from fastuper.models.upernet_configuration import UperNetConfig, named_backbone_config, upernet_config_from
from fastuper.weights.errors import CheckpointError
from fastuper.weights.transformers import backbone_state_dict
from fastuper_kernels import upsample_argmax, upsample_cross_entropy
from fastuper_kernels.dispatch.modes import is_autocast, is_eager
from fastuper_kernels.ops.upsample_cross_entropy import as_two_classes, check_values


class UperNetForSemanticSegmentation(PretrainedMixin):
    """UPerNet over a ConvNeXt, Swin or ResNet backbone (or one of timm's or Transformers').

    The same network as `transformers.UperNetForSemanticSegmentation`: its configurations, checkpoints, outputs and
    losses. It differs where that one fails its users:

    - the auxiliary head runs only when labels are given;
    - with labels, full-size logits are computed only if somebody reads them; labels may be of another size than the
      images, or all ignored (the loss is 0 then); a model of one class is trained with binary cross entropy;
    - an image can be trained on alone: BatchNorm over a single cell takes its running statistics;
    - images of any size from 1 x 1 are taken, and Swin's absolute position embeddings are resampled to them;
    - default backbone configurations give all of their stages;
    - Swin's hidden states are maps (B, C, H, W), as in Transformers 5 (4.x: (B, L, C)), and attentions are returned
      whenever they are asked for (5.x: only with eager attention; with `return_dict=False`, never alone).

    Args:
        config: a `UperNetConfig`, ours or Transformers'.

    Attributes:
        backbone: its `forward(pixel_values)` returns `feature_maps`.
        decode_head: the UPerNet head, from feature maps to logits at stride 4.
        auxiliary_head: None where the configuration has none.
    """

    config_class = UperNetConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    main_input_name = "pixel_values"

    def __init__(self, config: UperNetConfig | Any):
        super().__init__()
        given = upernet_config_from(config)
        self.config = _with_backbone_config(given)
        self.backbone = build_backbone(self.config.backbone_config)
        channels = self.backbone.channels
        self.decode_head = UperNetHead(self.config, channels)
        self.auxiliary_head = FCNHead(self.config, channels) if self.config.use_auxiliary_head else None
        self.register_load_state_dict_pre_hook(rename_on_load)
        self.initialize()
        if given.use_pretrained_backbone:
            self._load_backbone(given)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        output_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """Segment images.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised; any size.
            output_attentions: whether to return the attention weights; the configuration decides where None.
            output_hidden_states: whether to return the backbone's hidden states; likewise.
            labels: (B, H, W), integers in [0, num_labels) or `config.loss_ignore_index`, of the images' size or any
                other; gives the loss. For one class: 1 where it is, and 0.
            return_dict: whether to return an output object (True) or its tuple; likewise.
            output_logits: whether logits are in the output. Where None they are; with labels they are computed when
                somebody reads them, or at once in a tuple, under DistributedDataParallel and wherever something
                traces. True computes them at once.
            num_items_in_batch: what to divide the sum of the pixels' losses by, an integer or a scalar tensor: where
                several batches make one step, the pixels that are not ignored in all of them. This batch's own where
                None.

        Returns:
            `SemanticSegmenterOutput`: `loss` is the mean cross entropy over the pixels that are not ignored, of the
            logits resampled to the labels' size, plus `auxiliary_loss_weight` times the auxiliary head's, in the
            logits' type (float32 under autocast); `logits` are (B, num_labels, H, W), contiguous.

        Raises:
            ValueError: pixels or labels of a wrong shape, type or range; the message says what was expected.
        """
        config = self.config
        pixel_values = self._check_pixels(pixel_values)
        if labels is not None:
            labels = self._check_labels(labels, pixel_values)
        elif num_items_in_batch is not None:
            raise ValueError("num_items_in_batch is what the loss is divided by: give labels too")
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        as_dict = config.return_dict if return_dict is None else return_dict
        size = pixel_values.shape[2:]

        maps, hidden_states, attentions = self._features(pixel_values, output_hidden_states, output_attentions)
        coarse = self.decode_head(maps)
        loss = None
        if labels is not None:
            loss = self._loss(coarse, labels, num_items_in_batch)
            if self.auxiliary_head is not None:
                auxiliary_loss = self._loss(self.auxiliary_head(maps), labels, num_items_in_batch)
                loss = loss + config.auxiliary_loss_weight * auxiliary_loss
        del maps  # nothing needs them while the logits take their full size

        def full_size() -> torch.Tensor:
            # The head's logits are channels_last; resampled from that they would have to be copied at full size.
            return _resize(coarse.contiguous(), size).contiguous()

        logits: Any = None
        if output_logits is None and loss is not None and as_dict and is_eager() and not _in_ddp():
            logits = Deferred(full_size, coarse.device.type)
        elif output_logits is not False:
            logits = full_size()
        output = known_to_transformers(SemanticSegmenterOutput)(loss, logits, hidden_states, attentions)
        return output if as_dict else output.to_tuple()

    def _loss(
        self, coarse: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Return the cross entropy of logits at stride 4, resampled to the labels' size."""
        ignore_index = self.config.loss_ignore_index
        if num_items_in_batch is None:
            return upsample_cross_entropy(coarse, labels, ignore_index=ignore_index)
        # In float32, as float16's largest number is less than the sum over an image can be.
        wide = coarse.to(torch.promote_types(coarse.dtype, torch.float32))
        total = upsample_cross_entropy(wide, labels, ignore_index=ignore_index, reduction="sum")
        count = torch.as_tensor(num_items_in_batch, device=total.device)
        loss = total / (count + (count == 0))  # nothing but ignored pixels: 0, as without it
        return loss if is_autocast(total.device.type) else loss.to(coarse.dtype)

    @torch.no_grad()
    def segment(
        self, pixel_values: torch.Tensor, target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Return the label map of each image: `forward`, then the processor's `post_process_semantic_segmentation`.

        The module's mode is left as it is: call `eval()` first.

        Args:
            pixel_values: (B, C, H, W), as for `forward`.
            target_sizes: (height, width) of each label map, one an image; the images' own size where None. Logits are
                resampled to the images' size and then to this one, as Transformers does.

        Returns:
            B label maps, each (height, width), int64. For one class: 1 where it is (its logit is above 0), and 0.

        Raises:
            ValueError: `target_sizes` are not as many as the images, or not pairs of integers from 1; pixels or
                logits are not finite.
        """
        pixel_values = self._check_pixels(pixel_values)
        size = (pixel_values.shape[2], pixel_values.shape[3])
        if target_sizes is None:
            targets = [size] * len(pixel_values)
        else:
            try:
                targets = [(operator.index(height), operator.index(width)) for height, width in target_sizes]
            except (TypeError, ValueError):
                targets = [(0, 0)]
            if any(height < 1 or width < 1 for height, width in targets):
                raise ValueError(
                    f"target_sizes must be a (height, width) for each image, integers from 1, got {target_sizes}"
                )
        if len(targets) != len(pixel_values):
            raise ValueError(
                f"{len(targets)} target_sizes for a batch of {len(pixel_values)} images; give one an image"
            )
        logits = as_two_classes(self.decode_head(self._features(pixel_values, False, False)[0]))
        if logits.is_cuda and all(target == targets[0] for target in targets):  # in one launch
            labels = list(upsample_argmax(logits, _chain(size, targets[0])))
        else:
            labels = [
                upsample_argmax(image, _chain(size, target))[0]
                for image, target in zip(logits.split(1), targets, strict=True)
            ]
        # Looked at last: on a GPU the host waits here, and everything has been launched by then.
        if not torch.compiler.is_compiling() and not logits.isfinite().all():
            wrong = "the weights are not, or they overflow " + str(logits.dtype)
            if not pixel_values.isfinite().all():
                wrong = "pixel_values hold NaN or infinity"
            raise ValueError(f"the logits are not finite, so that labels would mean nothing: {wrong}")
        return labels

    def capture(self, pixel_values: torch.Tensor, target_size: tuple[int, int] | None = None) -> Captured:
        """Return a function of images of this very shape that replays the model's work as a CUDA graph.

        Args:
            pixel_values: (B, C, H, W) on a GPU: an example of what will be given.
            target_size: (height, width): the function gives label maps (B, height, width), int64, of this size, and
                logits (B, num_labels, H, W) where None.

        Raises:
            ValueError: `pixel_values` are not on a GPU, or of a wrong shape or type.
        """
        pixel_values = self._check_pixels(pixel_values)
        size = (pixel_values.shape[2], pixel_values.shape[3])

        def logits(x: torch.Tensor) -> torch.Tensor:
            return self(x, return_dict=True).logits

        def labels(x: torch.Tensor) -> torch.Tensor:
            assert target_size is not None
            coarse = as_two_classes(self.decode_head(self._features(x, False, False)[0]))
            return upsample_argmax(coarse, _chain(size, (target_size[0], target_size[1])))

        return Captured(self, logits if target_size is None else labels, pixel_values)

    def _load_backbone(self, config: UperNetConfig) -> None:
        """Load the weights of the backbone that a configuration names: those of a classifier, most often."""
        assert config.backbone is not None  # the configuration has seen to it
        if config.use_timm_backbone:  # timm has loaded them; whoever loads what is saved has no need to
            self.config.backbone_config.values["use_pretrained_backbone"] = False
            return
        if self.device.type == "meta":  # a checkpoint with all of the weights comes next
            return
        if not isinstance(self.backbone, Backbone):
            from transformers import AutoBackbone

            self.backbone = AutoBackbone.from_pretrained(config.backbone, **(config.backbone_kwargs or {}))
            return
        weights, _ = read_weights(config.backbone)
        model_type = self.backbone.config.model_type
        names = checkpoint_names(model_type)
        weights = backbone_state_dict(weights, model_type, names)
        missing, unexpected = self.backbone.load_state_dict(weights, strict=False)
        # A classifier has no norms of the stages' outputs, and computed buffers have their values already.
        missing = [n for n in missing if not n.startswith("hidden_states_norms.") and not names.is_computed(n)]
        if missing or unexpected:
            raise CheckpointError(f"{config.backbone}: missing {missing}, unexpected {unexpected}")

    def _features(self, pixel_values: torch.Tensor, output_hidden_states: bool, output_attentions: bool) -> Any:
        """Return the backbone's feature maps, hidden states and attentions.

        Backbones of Transformers filter the arguments that they do not know themselves.
        """
        call = partial(
            getattr(self.backbone, "forward_with_filtered_kwargs", self.backbone),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        if self.gradient_checkpointing and self.training and not isinstance(self.backbone, Backbone):
            output = checkpointed(call, self.backbone, pixel_values)  # as a whole: its blocks are another library's
        else:
            output = call(pixel_values)
        return output.feature_maps, output.hidden_states, output.attentions

    def _check_pixels(self, pixel_values: torch.Tensor | None) -> torch.Tensor:
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        if not isinstance(pixel_values, torch.Tensor):
            raise TypeError(
                f"pixel_values must be a tensor, got {type(pixel_values).__name__}: "
                "give images to UperNetImageProcessor first"
            )
        if pixel_values.ndim != 4 or 0 in pixel_values.shape:
            raise ValueError(f"pixel_values must be (batch, channels, height, width), got {tuple(pixel_values.shape)}")
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floating point and normalised, got {pixel_values.dtype}: "
                "give the images to UperNetImageProcessor first"
            )
        return pixel_values

    def _check_labels(self, labels: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
        if labels.ndim != 3 or labels.shape[0] != pixel_values.shape[0] or 0 in labels.shape:
            raise ValueError(
                f"labels must be (batch, height, width) for the {pixel_values.shape[0]} images, "
                f"got {tuple(labels.shape)}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        labels = labels.long()
        # Before anything runs: a refused batch leaves no trace in BatchNorm's statistics. On a GPU looking would make
        # every step wait for it.
        if labels.device.type == "cpu" and is_eager():
            check_values(labels, max(self.config.num_labels, 2), self.config.loss_ignore_index)
        return labels

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether `transformers.Trainer` is to say how many labels several batches have together: it counts by -100."""
        return self.config.loss_ignore_index == -100

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Compute activations again for the backward pass, block by block, in place of keeping them.

        Args:
            gradient_checkpointing_kwargs: what `transformers.Trainer` hands over; the one thing that it may say is
                `use_reentrant=False`.

        Raises:
            ValueError: it says something else.
        """
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Do what `gradient_checkpointing_enable` does; this is its name in Transformers 5.

        Args:
            activation_checkpointing_kwargs: see there.
            every_n_layers: do it for every nth of the backbone's blocks alone.
            offload: not to be had; False.

        Raises:
            ValueError: options that are not there.
        """
        said = dict(activation_checkpointing_kwargs or {})
        if said.pop("use_reentrant", False) or said or offload or every_n_layers < 1:
            raise ValueError(
                "gradient checkpointing has use_reentrant=False and every_n_layers from 1, got "
                f"{activation_checkpointing_kwargs}, every_n_layers={every_n_layers}, offload={offload}"
            )
        self._set_gradient_checkpointing(every_n_layers)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self._set_gradient_checkpointing(0)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are computed again."""
        return self.gradient_checkpointing

    # Their names in Transformers 5.
    activation_checkpointing_disable = gradient_checkpointing_disable
    is_activation_checkpointing = is_gradient_checkpointing

    def _set_gradient_checkpointing(self, every: int) -> None:
        """Turn it on for every nth block of the backbone and for the heads; 0 turns it off."""
        self.gradient_checkpointing = every > 0
        blocks = [module for module in self.backbone.modules() if isinstance(module, Checkpointed)]
        for i, block in enumerate(blocks):
            block.gradient_checkpointing = every > 0 and i % every == 0
        for head in (self.decode_head, self.auxiliary_head):
            if isinstance(head, Checkpointed):
                head.gradient_checkpointing = every > 0

    @torch.no_grad()
    def initialize(self, names: set[str] | None = None) -> None:
        """Fill parameters and buffers with the initial values that Transformers gives them.

        Args:
            names: full names of those to fill; all of them where None. A backbone of another library initialises
                itself when it is built: its tensors are left as they are.
        """
        for path, module in self.named_modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if names is not None and (f"{path}.{name}" if path else name) not in names:
                    continue
                if not path.startswith("backbone"):
                    initialize_tensor(module, name, tensor, std=self.config.initializer_range)
                elif isinstance(self.backbone, Backbone):
                    self.backbone.initialize_tensor(module, name, tensor)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters, or of those that require a gradient.

        `exclude_embeddings` is Transformers' argument about token embeddings, of which there are none here.
        """
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def can_generate(self) -> bool:
        """Return False: pipelines ask whether a model generates text."""
        return False


def _chain(size: tuple[int, int], target: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the sizes that logits are resampled through: the images', then the label map's where it is another."""
    return [size] if target == size else [size, target]


def _in_ddp() -> bool:
    """Return whether DistributedDataParallel calls the model: it looks for all that may take part in the gradient."""
    return torch.nn.parallel.DistributedDataParallel._active_ddp_module is not None


def _resize(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _with_backbone_config(config: UperNetConfig) -> UperNetConfig:
    """Return the configuration itself, or, where it only names a backbone, a copy with that backbone's own.

    The copy is what Transformers 5 makes of it, so that a saved model needs nothing but its own folder.
    """
    if config.backbone_config is not None:
        return config
    config = copy.deepcopy(config)
    config.backbone_config = named_backbone_config(config)
    config.backbone, config.backbone_kwargs = None, None
    config.use_timm_backbone, config.use_pretrained_backbone = False, False
    return config
