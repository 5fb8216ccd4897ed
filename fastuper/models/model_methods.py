"""What `transformers.PreTrainedModel` has besides loading and saving, without Transformers.

docs/differences.md lists what is left out, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from fastuper.models.gradient_checkpointing import Checkpointed
from fastuper.models.known_to_transformers import KnownToTransformers


class ModelMethods(KnownToTransformers, nn.Module):
    """The methods and attributes of a `PreTrainedModel` that mean something for a model of images.

    The class that inherits it has a `config` and the methods `initialize` and `_init_weights`.

    Attributes:
        name_or_path: the folder or Hub repository that the model was loaded from; "" for a new model.
        model_tags: tags of the model card that `push_to_hub` writes; None if there are none.
    """

    _their_class = ("transformers.modeling_utils", "PreTrainedModel")

    config: Any
    name_or_path: str
    model_tags: list[str] | None = None

    framework = "pt"
    input_modalities = ("image",)
    main_input_name = "pixel_values"
    base_model_prefix = ""
    is_parallelizable = False

    # No two parameters are tied, and no tensor is left out of a checkpoint. PEFT and accelerate read these attributes.
    all_tied_weights_keys: ClassVar[Mapping[str, str]] = {}
    _tied_weights_keys = None
    _keys_to_ignore_on_save = None
    _keys_to_ignore_on_load_missing = None
    _keys_to_ignore_on_load_unexpected = None
    # The whole model has one dtype.
    _keep_in_fp32_modules: ClassVar[frozenset[str]] = frozenset()
    _keep_in_fp32_modules_strict: ClassVar[frozenset[str]] = frozenset()
    # Transformers' tensor, pipeline and expert parallelism do not divide the model. Its Trainer reads the sizes.
    tp_plan: ClassVar[Mapping[str, str]] = {}
    pp_plan: ClassVar[Mapping[str, str]] = {}
    ep_plan: ClassVar[Mapping[str, str]] = {}
    supports_tp_plan = supports_pp_plan = False
    tp_size = fsdp_size = None
    is_distributed_loading_by_transformers = False
    # Hooks of Transformers record no outputs: `forward` returns hidden states and attentions itself.
    can_record_outputs: ClassVar[Mapping[str, Any]] = {}
    _can_record_outputs = None
    _skip_keys_device_placement = None
    _is_stateful = False
    _auto_class = None
    _hf_peft_config_loaded = False

    def initialize(self, names: set[str] | None = None, *, keep_unknown: bool = False) -> None:
        """Fill parameters and buffers with initial values, in place.

        Args:
            names: their full names; all if None.
            keep_unknown: True to leave the tensors of a module for which no initial value is defined as they are.

        Raises:
            NotImplementedError: no initial value is defined for a module, and `keep_unknown` is False.
        """
        raise NotImplementedError(f"{type(self).__name__} has no initialize(names)")

    def _init_weights(self, module: nn.Module) -> None:
        """Fill the parameters and buffers of one module, without its children's, with initial values.

        A subclass with modules of its own overrides it, as in Transformers.

        Raises:
            NotImplementedError: no initial value is defined for a module of this class.
        """
        raise NotImplementedError(f"no initial value is defined for {type(module).__name__}; override _init_weights")

    # ------------------------------------------------------------------------------------------------------- the class

    @classmethod
    def can_generate(cls) -> bool:
        """Return False: the model generates no text."""
        return False

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return True, so that no names are converted: modules are named as on the Hub."""
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        """Return False: the class was not loaded from the Hub."""
        return False

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Return False: text-generation servers cannot run the model."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return False

    # -------------------------------------------------------------------------------------------------- initial values

    def post_init(self) -> None:
        """Initialise the modules that a subclass has added: its `__init__` calls this method last."""
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise the modules that have no values of this model yet; see `initialize_weights`."""
        if torch.get_default_device().type != "meta":
            self.initialize_weights()

    def initialize_weights(self) -> None:
        """Fill the modules that were added since the model was built or loaded with initial values.

        Modules of a class without such a rule keep the values that their constructor gave them.
        """
        new = {
            f"{path}.{name}" if path else name
            for path, module in self.named_modules()
            if not getattr(module, "_is_hf_initialized", False)
            for name, _ in own_tensors(module)
        }
        self.initialize(new, keep_unknown=True)
        self._mark_initialized()

    def _mark_initialized(self) -> None:
        """Record that all modules have their values, so that `init_weights` changes none of them."""
        for module in self.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]

    # ------------------------------------------------------------------------------------ what the model is made of

    @property
    def base_model(self) -> Any:
        """The module of the name `base_model_prefix`; the model itself if there is none."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """A batch for `forward`: one black image of 64 x 64."""
        channels = getattr(self.config.backbone_config, "num_channels", 3)
        return {"pixel_values": torch.zeros(1, channels, 64, 64, dtype=self.dtype, device=self.device)}

    @property
    def _no_split_modules(self) -> set[str]:
        """The classes of the blocks that accelerate and FSDP keep on one device."""
        found = {type(module).__name__ for module in self.modules() if isinstance(module, Checkpointed)}
        theirs: Iterable[str] = getattr(getattr(self, "backbone", None), "_no_split_modules", None) or ()
        return found.union(theirs)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters, or of the parameters that require a gradient.

        `exclude_embeddings` is Transformers' argument about token embeddings; this model has none.
        """
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of all parameters and, with `return_buffers`, of all buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def estimate_tokens(self, input_dict: Mapping[str, Any]) -> int:
        """Return the number of values in `pixel_values`; Transformers 4.x counts with it."""
        pixels = input_dict.get(self.main_input_name)
        return 0 if pixels is None else pixels.numel()

    def floating_point_ops(self, input_dict: Mapping[str, Any], exclude_embeddings: bool = True) -> int:
        """Return the estimate that Transformers' Trainer logs as `total_flos`: 6 x values x parameters.

        It is a formula for text. For images it has no meaning beyond the log.
        """
        return 6 * self.estimate_tokens(input_dict) * self.num_parameters(exclude_embeddings=exclude_embeddings)

    def get_parameter_or_buffer(self, target: str) -> torch.Tensor:
        """Return the parameter or buffer of a full name.

        Raises:
            AttributeError: there is neither.
        """
        for get in (self.get_parameter, self.get_buffer):
            try:
                return get(target)
            except AttributeError:
                pass
        raise AttributeError(f"{target!r} is neither a parameter nor a buffer of {type(self).__name__}")

    def named_non_persistent_buffers(
        self, recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and value of each buffer that a state dict does not hold."""
        stored = self.state_dict(keep_vars=True)
        for name, buffer in self.named_buffers(recurse=recurse, remove_duplicate=remove_duplicate):
            if name not in stored:
                yield name, buffer

    # ---------------------------------------------------------------------------------------- tied weights, embeddings

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Do nothing: no two parameters are tied."""

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return no names: no two parameters are tied."""
        return {}

    def get_output_embeddings(self) -> None:
        """Return None: there are no token embeddings."""
        return None

    def _no_embeddings(self, *_: Any, **__: Any) -> Any:
        """Raise NotImplementedError: the model has no embeddings of tokens or positions."""
        raise NotImplementedError(f"{type(self).__name__} has no embeddings of tokens or positions")

    get_input_embeddings: Callable[..., Any] = _no_embeddings
    set_input_embeddings: Callable[..., Any] = _no_embeddings
    set_output_embeddings: Callable[..., Any] = _no_embeddings
    resize_token_embeddings: Callable[..., Any] = _no_embeddings
    get_position_embeddings: Callable[..., Any] = _no_embeddings
    resize_position_embeddings: Callable[..., Any] = _no_embeddings

    def enable_input_require_grads(self) -> None:
        """Do nothing: gradient checkpointing is not reentrant, and adapters get gradients without it."""

    def disable_input_require_grads(self) -> None:
        """Do nothing, as `enable_input_require_grads`."""

    # ------------------------------------------------------------------------------------------------------- attention

    def set_attn_implementation(
        self, attn_implementation: str | Mapping[str, Any] | None, allow_all_kernels: bool = False
    ) -> None:
        """Accept "eager", "sdpa" and None, none of which changes how attention is computed.

        Args:
            attn_implementation: the name, or a dictionary of names by part of the model.
            allow_all_kernels: Transformers' argument, without effect.

        Raises:
            ValueError: another name.
        """
        if isinstance(attn_implementation, Mapping):
            for part in attn_implementation.values():
                self.set_attn_implementation(part)
        else:
            self.get_correct_attn_implementation(attn_implementation)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Return "eager" for None, and "eager" and "sdpa" themselves.

        Raises:
            ValueError: another name.
        """
        name = requested_attention or "eager"
        if name not in ("eager", "sdpa"):
            raise ValueError(
                f'Specified `attn_implementation="{name}"` is not supported; "eager" and "sdpa" are, '
                "and the result is the same"
            )
        return name

    # ------------------------------------------------------------------------------------------------------ model card

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags that the model card has after `push_to_hub`."""
        known = self.model_tags or []
        new = [tags] if isinstance(tags, str) else tags
        self.model_tags = [*known, *(tag for tag in dict.fromkeys(new) if tag not in known)]


def own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the names and values of a module's parameters and buffers, without its children's."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def children_first(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and the module of each module inside, a parent after its children, and then the module itself."""
    for name, child in module.named_children():
        yield from children_first(child, f"{path}.{name}" if path else name)
    yield path, module
