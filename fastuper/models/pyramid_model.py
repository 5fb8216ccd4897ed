"""`PyramidModel`, the base of the models: a backbone, and heads over a feature pyramid on its maps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.models.backbones import Backbone, build_backbone
from fastuper.models.backbones.foreign import Sizes, custom_config, measured_maps, neck_of
from fastuper.models.backbones.foreign.measuring import static_size
from fastuper.models.backbones.layers import initialize_tensor
from fastuper.models.gradient_checkpointing import Checkpointed, GradientCheckpointingMixin, checkpointed
from fastuper.models.model_methods import children_first, own_tensors
from fastuper.models.pretrained import PretrainedMixin, rename_on_load

Model = TypeVar("Model", bound="PyramidModel")

OF_THE_BACKBONE = ("backbone_config", "backbone", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone")
"""The values of a configuration that describe its backbone."""


class PyramidModel(GradientCheckpointingMixin, PretrainedMixin):
    """Base of the models with a `backbone` and a `decode_head` over its maps.

    A subclass is built by `cls(config, backbone=None)`. Its constructor sets `config`, calls `_add_backbone`, sets the
    heads, and then calls `_complete`.

    Attributes:
        backbone: its `forward(pixel_values)` returns `feature_maps`.
        neck: makes levels of a vision transformer's maps; None for other backbones, and for ours, which have their own.
        image_sizes: the sizes of images that the backbone takes; all others are padded.
    """

    decode_head: Any
    neck: Any
    image_sizes: Sizes

    @classmethod
    def over(
        cls: type[Model],
        module: nn.Module,
        config: Any = None,
        *,
        channels: Sequence[int] | None = None,
        **values: Any,
    ) -> Model:
        """Return a model whose backbone is a module of yours; its weights stay as they are.

        `save_pretrained` writes the module's weights with all others, and in config.json its channels and the name of
        its class. `from_pretrained(folder, backbone=module)` loads the weights into a module of the same structure.

        Args:
            module: takes images (B, 3, H, W) and returns four maps (B, C_l, H_l, W_l), finest first: a list, a tuple,
                a dictionary of tensors in this order, or an object that has them as `feature_maps`.
            config: the configuration of the heads; its backbone is not read. The defaults if None.
            channels: the channels of the four maps. If None, the module runs once on a black image of 64 x 64, in
                evaluation mode and without gradients.
            **values: values of the configuration, such as `hidden_size=256`; they replace those of `config`.

        Raises:
            TypeError: `module` is no module, or the configuration has no value of a name in `values`.
            ValueError: the module refuses the image, or does not return four maps, finest first; a value is not valid.
        """
        backbone_config = custom_config(module, channels)
        given = {} if config is None else cls._config_from(config).to_dict()
        given = {name: value for name, value in given.items() if name not in OF_THE_BACKBONE}
        return cls(cls.config_class.from_dict({**given, "backbone_config": backbone_config}, **values), backbone=module)

    @classmethod
    def _config_from(cls, config: Any) -> Any:
        """Return a configuration of `config_class` for a given one or a dictionary."""
        raise NotImplementedError(f"{cls.__name__} has no _config_from(config)")

    def __init__(self, config: Any = None, backbone: nn.Module | None = None):
        super().__init__()

    def _add_backbone(self, module: nn.Module | None) -> list[int]:
        """Build the backbone of the configuration, or take a user's module; return the channels of the maps."""
        self.backbone = build_backbone(self.config.backbone_config, module)
        self.neck = neck_of(self.backbone)
        maps = measured_maps(self.backbone)
        self.image_sizes = Sizes() if maps is None else maps.sizes
        if self.neck is not None:
            return self.neck.channels
        return self.backbone.channels if maps is None else list(maps.channels)

    def _complete(self) -> None:
        """Fill the heads with initial values and prepare the model for use; the end of a subclass's constructor."""
        self.register_load_state_dict_pre_hook(rename_on_load)
        self.name_or_path = self.config.name_or_path
        self.post_init()
        if getattr(self.config, "gradient_checkpointing", False):  # an option of old configurations
            self.gradient_checkpointing_enable()
            del self.config.gradient_checkpointing

    def _returned(
        self, output_attentions: bool | None, output_hidden_states: bool | None, return_dict: bool | None
    ) -> tuple[bool, bool, bool]:
        """Return the arguments of `forward` that say what it returns; the configuration's values for None."""
        config = self.config
        return (
            config.output_attentions if output_attentions is None else output_attentions,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            config.return_dict if return_dict is None else return_dict,
        )

    def _features(self, pixel_values: torch.Tensor, output_hidden_states: bool, output_attentions: bool) -> Any:
        """Return feature maps, the backbone's hidden states and attentions, of images padded to `image_sizes`."""
        pixel_values = self.image_sizes.pad(pixel_values)
        call = partial(
            # A backbone of Transformers drops unknown arguments in this method.
            getattr(self.backbone, "forward_with_filtered_kwargs", self.backbone),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        if self.gradient_checkpointing and self.training and not _has_checkpointed_blocks(self.backbone):
            # The backbone is recomputed as a whole, because the blocks of another library are not `Checkpointed`.
            output = checkpointed(call, self.backbone, pixel_values)
        else:
            output = call(pixel_values)
        maps = output.feature_maps if self.neck is None else self.neck(output.feature_maps)
        return maps, output.hidden_states, output.attentions

    def _cropped(self, logits: torch.Tensor, size: Sequence[int], align_corners: bool = False) -> torch.Tensor:
        """Return the logits of images that were padded, resampled to the padded size and cropped to `size`.

        If the images were not padded, the logits (B, num_labels, h, w) are returned as they are.
        """
        sizes = self.resampled_sizes(logits.shape[2:], size)
        if sizes is None:
            return logits
        padded, (height, width) = sizes
        full = F.interpolate(logits.contiguous(), padded, mode="bilinear", align_corners=align_corners)
        return full[:, :, :height, :width].contiguous()

    def resampled_sizes(self, coarse: Sequence[int], size: Sequence[int]) -> tuple[Any, Any] | None:
        """Return the sizes to which logits are resampled, and then cropped; None for images that need no padding.

        In a graph with free sizes, both are the logits' own for images that need none.

        Args:
            coarse: (height, width) of the logits.
            size: (height, width) of the images.
        """
        sizes = self.image_sizes
        padded = sizes.padded(*size)
        if sizes.fits_all or static_size(size) == padded:
            return None
        if static_size(size) is not None:
            return padded, tuple(size)
        added = padded[0] - size[0] + padded[1] - size[1]
        is_padded = added.clamp(max=1) if isinstance(added, torch.Tensor) else torch.sym_min(added, 1)
        return (
            tuple(own + is_padded * (full - own) for own, full in zip(coarse, padded, strict=True)),
            tuple(own + is_padded * (kept - own) for own, kept in zip(coarse, size, strict=True)),
        )

    @torch.no_grad()
    def initialize(self, names: set[str] | None = None, *, keep_unknown: bool = False) -> None:
        """Fill parameters and buffers with their initial values.

        Args:
            names: full names of the tensors to fill; all tensors if None. A backbone that is not ours has its values
                when it is built: its tensors do not change.
            keep_unknown: True to leave the tensors of a module for which no initial value is defined as they are.

        Raises:
            NotImplementedError: no initial value is defined for a module, and `keep_unknown` is False.
        """
        backbone = set(self.backbone.modules())
        for path, module in children_first(self):
            prefix = f"{path}." if path else ""
            own = own_tensors(module)
            chosen = [(name, tensor) for name, tensor in own if names is None or prefix + name in names]
            try:
                if module in backbone:
                    for name, tensor in chosen if isinstance(self.backbone, Backbone) else ():
                        self.backbone.initialize_tensor(module, name, tensor)
                elif names is None or names.issuperset(
                    prefix + name for name, _ in own or [*module.named_parameters(), *module.named_buffers()]
                ):
                    self._init_weights(module)
                else:
                    for name, tensor in chosen:
                        self._initialize_tensor(module, name, tensor)
            except NotImplementedError:
                if not keep_unknown:
                    raise

    def _init_weights(self, module: nn.Module) -> None:
        """Fill the parameters and buffers of one module outside the backbone; a subclass overrides it for its own.

        Raises:
            NotImplementedError: no initial value is defined for a module of this class.
        """
        for name, tensor in own_tensors(module):
            self._initialize_tensor(module, name, tensor)

    def _initialize_tensor(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Fill one parameter or buffer of a module outside the backbone with its initial value.

        Raises:
            NotImplementedError: no initial value is defined for a module of this class.
        """
        initialize_tensor(module, name, tensor, std=self.config.initializer_range)


def check_finite(logits: Sequence[torch.Tensor], pixel_values: Sequence[torch.Tensor]) -> None:
    """Refuse logits that are not finite; a compiler leaves the check out. The host waits here for a GPU.

    Raises:
        ValueError: some are not; the message says whether pixels or weights are the cause.
    """
    if torch.compiler.is_compiling() or all(map(_is_finite, logits)):
        return
    if not all(map(_is_finite, pixel_values)):
        cause = "pixel_values contain NaN or infinity"
    else:
        cause = f"weights are not finite, or they overflow {logits[0].dtype}"
    raise ValueError(f"the logits are not finite, and labels would have no meaning: {cause}")


def _is_finite(x: torch.Tensor) -> bool:
    # The sum finds infinities and NaN without a mask. It may itself overflow, and then decides nothing.
    total = x.sum(dtype=torch.promote_types(x.dtype, torch.float32))
    return bool(total.isfinite()) or bool(x.isfinite().all())


def _has_checkpointed_blocks(backbone: nn.Module) -> bool:
    """Return True if a backbone is ours, or has blocks of ours inside."""
    return isinstance(backbone, Backbone) or any(isinstance(part, Checkpointed) for part in backbone.modules())
