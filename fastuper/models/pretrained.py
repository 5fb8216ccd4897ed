"""`from_pretrained`, `save_pretrained` and `push_to_hub`."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import nn

from fastuper.io.arguments import take_arguments
from fastuper.io.hub import CONFIG_NAME, HubOptions, pin_revision, upload
from fastuper.io.messages import listed
from fastuper.models.backbones.registry import checkpoint_names
from fastuper.models.configuration import as_dtype
from fastuper.models.memory import check_memory
from fastuper.models.model_methods import ModelMethods
from fastuper.weights.dialects import describe, is_foreign
from fastuper.weights.errors import CheckpointError
from fastuper.weights.reading import FLOATING, Stored, described, find_weights, iterate_weights, stored_tensors
from fastuper.weights.transformers import Names, adapter_key_mapping, hub_name
from fastuper.weights.writing import WeightFiles, as_independent, atomic_weights, remove_replaced, split_weights
from fastuper_kernels.dispatch.torch_private import buffers_of, parameters_of

if TYPE_CHECKING:
    from fastuper.weights.conversion import Conversion

logger = logging.getLogger("fastuper")

Model = TypeVar("Model", bound="PretrainedMixin")
StrPath: TypeAlias = "str | os.PathLike[str]"


# ---------------------------------------------------------------------------------------------------------------- names


def rename_on_load(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Rename the tensors of a Transformers 5 state dict; a hook for `nn.Module.register_load_state_dict_pre_hook`.

    Names that the module itself has stay as they are. If a buffer that follows from the configuration is missing, the
    module's own is taken.

    Args:
        module: a UPerNet.
        state_dict: changed in place, except the keys that do not begin with `prefix`.
        prefix: the name of the module inside the module that is loaded, with a final dot; "" if they are the same.
    """
    own = module.state_dict(keep_vars=True)  # without buffers that are not stored, such as the index of a Swin v2
    names = backbone_names(module)
    for key in list(state_dict):
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name in own:
            continue
        ours = hub_name(name, names)
        if ours is None:
            del state_dict[key]
        elif prefix + ours not in state_dict:  # if it is, `load_state_dict` reports the other name as unexpected
            state_dict[prefix + ours] = state_dict.pop(key)
    for name, buffer in own.items():
        if names.is_computed(name):
            state_dict.setdefault(prefix + name, buffer)
    # PEFT drops the tensors of an adapter whose module it has not found, without a word.
    leaves = {name for name, part in module.named_modules() if not any(part.children())}
    strays = [name for name in _names_in(state_dict, prefix) if name not in own and not leaves.isdisjoint(_above(name))]
    if strays:
        logger.warning(
            "%d tensors have no place in the model, such as %s. If they are an adapter's, its target_modules must name "
            "modules of this model: in a Swin query, key, value and dense, where Transformers 5 has q_proj, k_proj, "
            "v_proj, o_proj, fc1 and fc2",
            len(strays),
            listed(strays, 1),
        )


def _names_in(state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]


def _above(name: str) -> list[str]:
    """Return the paths of the modules above a tensor: "a.b" and "a" for "a.b.weight"."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def backbone_names(model: nn.Module) -> Names:
    """Return the checkpoint names of a model's backbone, by the `model_type` in its configuration."""
    backbone_config = getattr(getattr(model, "config", None), "backbone_config", None)
    return checkpoint_names(getattr(backbone_config, "model_type", ""))


def _names_on_disk(model: nn.Module) -> dict[str, str]:
    """Return {name in memory: name on disk} of the tensors that Transformers 5 has renamed in its own backbones.

    Transformers' own function renames them. It returns the same tensors, because no conversion of a backbone changes
    values.
    """
    backbone: Any = getattr(model, "backbone", None)
    if not any(cls.__module__.startswith("transformers.") for cls in type(backbone).__mro__):
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # Transformers 4 has one set of names
        return {}
    state_dict = backbone.state_dict(keep_vars=True)
    on_disk = {id(tensor): name for name, tensor in revert_weight_conversion(backbone, dict(state_dict)).items()}
    return {
        f"backbone.{name}": f"backbone.{on_disk[id(tensor)]}"
        for name, tensor in state_dict.items()
        if on_disk.get(id(tensor), name) != name
    }


# --------------------------------------------------------------------------------------------- from_pretrained and back


class PretrainedMixin(ModelMethods):
    """`from_pretrained`, `save_pretrained` and `push_to_hub`, as `transformers.PreTrainedModel` has them.

    The class that inherits it is built by `cls(config)`, or by `cls(config, backbone=module)` with a user's module. It
    has the attributes below and the method `initialize`.

    Attributes:
        config_class: a class with `from_pretrained` and `from_dict`; its objects have `to_dict` and `save_pretrained`.
        config: the model's configuration.
    """

    config_class: ClassVar[Any]
    config: Any

    @property
    def adapter_key_mapping(self) -> dict[str, str]:
        """The argument `key_mapping` with which PEFT loads an adapter that was trained on Transformers 5's model.

        `PeftModel.from_pretrained` uses it by itself; `PeftModel.load_adapter` takes it as an argument.
        """
        return adapter_key_mapping(backbone_names(self))

    _checkpoint_conversion_mapping = adapter_key_mapping  # the name by which PEFT reads it

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: StrPath | None,
        *,
        config: Any = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        num_labels: int | None = None,
        id2label: Mapping[Any, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        subfolder: str = "",
        revision: str | None = None,
        variant: str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device_map: torch.device | str | int | Mapping[str, Any] | None = None,
        use_safetensors: bool | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        backbone: nn.Module | str | None = None,
        source_options: Mapping[str, Any] | None = None,
        **config_overrides: Any,
    ) -> Model:
        """Load a checkpoint from a folder or a Hub repository, in evaluation mode.

        A file, or a folder of another library, is converted in memory: docs/migrate.md lists what can be. Warnings say
        which values were chosen. `fastuper convert` writes the same model as a folder.

        A checkpoint may lack the auxiliary head, which only training needs. With `ignore_mismatched_sizes=True` it may
        also lack the head, a classifier, the head of a task, or the norms of the backbone's outputs
        (`hidden_states_norms`). They are newly initialised. Warnings list them and the checkpoint's unused tensors. A
        checkpoint that lacks other tensors is refused: its names or its configuration are not the model's.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a Hub repository; None with `config` and `state_dict`.
                Or the checkpoint of another library, a file or a folder.
            config: a configuration in place of the checkpoint's: this library's, Transformers', a dictionary, or the
                folder or repository that has it.
            state_dict: weights in place of the checkpoint's files; they are copied.
            dtype: a `torch.dtype` or its name. If "auto" or None, the configuration's dtype; if it has none, the dtype
                of the checkpoint's first floating-point tensor.
            torch_dtype: the older name of `dtype`.
            device: the model's device; the default device if None.
            num_labels: the number of classes, if it is not the checkpoint's.
            id2label: the names of the classes.
            label2id: the inverse of `id2label`, made from it if None.
            token: for private repositories; True for the token that `hf auth login` stored.
            cache_dir: the folder of the Hub's cache.
            subfolder: the place of the checkpoint in the folder or repository.
            revision: a branch, tag or commit of the repository.
            variant: the middle of the files' names, "fp16" for `model.fp16.safetensors`.
            local_files_only: use only files in the cache, and never ask the Hub.
            force_download: download the files again, even if the cache has them.
            device_map: Transformers' name of `device`: a device, {"": device}, or "auto" for a GPU if there is one.
            use_safetensors: True for only safetensors, False for only pickles (.bin), None for either.
            ignore_mismatched_sizes: initialise tensors whose shape differs from the checkpoint's (the classifier, if
                the number of classes differs), and heads that the checkpoint lacks, instead of raising an error.
            output_loading_info: also return which tensors were missing, unexpected or of another shape; any tensors may
                then be missing, and are newly initialised.
            backbone: the module that is the backbone of a model of `over`: the weights are copied into it. A text is
                the attribute `backbone` of the configuration.
            source_options: for the checkpoint of another library: values that it does not say itself, by their names in
                `fastuper.weights.conversion.OPTIONS`, and `weights_key`, the name of a state dict in the file.
            **config_overrides: attributes of the configuration to change, such as `loss_ignore_index=0`. Arguments of
                Transformers without an effect here (`low_cpu_mem_usage`, `attn_implementation="sdpa"`) are accepted.

        Returns:
            The model. With `output_loading_info=True`, the model and a dictionary: `missing_keys` and
            `unexpected_keys`, sets of names; `mismatched_keys`, a set of (name, shape in the checkpoint, shape in the
            model); and `error_msgs`, an empty list.

        Raises:
            CheckpointError: there are no weights, a file is damaged, or the weights are not a UPerNet's or only a part
                of one.
            OSError: there is no such folder, repository or revision, or it has no config.json.
            RuntimeError: tensors have another shape than the checkpoint's (the message lists them), the model exceeds
                the memory, or the default device is "meta" and no device is given.
            TypeError: an argument is unknown or not supported; the message gives the remedy.
            ValueError: `dtype` is not a dtype, or `torch_dtype` contradicts it; an option of `source_options` is
                unknown, or contradicts the checkpoint.
        """
        source = pretrained_model_name_or_path or "state_dict"
        if pretrained_model_name_or_path is None and (config is None or state_dict is None):
            raise ValueError("without a folder or repository, from_pretrained needs both config= and state_dict=")
        options = HubOptions(token, cache_dir, subfolder or "", revision, local_files_only, force_download)
        options = take_arguments(cls.__name__, config_overrides, options)
        module = backbone if isinstance(backbone, nn.Module) else None
        if backbone is not None and module is None:
            if not isinstance(backbone, str):
                raise TypeError(f"backbone must be a torch.nn.Module or a text, got {type(backbone).__name__}")
            config_overrides["backbone"] = backbone
        target = _device(device, device_map)
        wanted_dtype = _wanted_dtype(dtype, torch_dtype)
        conversion = None
        if config is None and state_dict is None and not options.subfolder and is_foreign(source):
            conversion = _converted(cls, source, source_options)
            config, state_dict = conversion.config, conversion.tensors
        elif source_options:
            raise TypeError(f"source_options are for the checkpoint of another library, and {source} is none")
        if config is None:
            options = pin_revision(source, options)
        labels = {"num_labels": num_labels, "id2label": id2label, "label2id": label2id}
        config = _build_config(cls, source if config is None else config, options, labels, config_overrides)
        config.name_or_path = str(pretrained_model_name_or_path or "")
        if state_dict is None:
            shards = find_weights(source, options, variant, use_safetensors)
            files, stored, tensors = list(map(str, shards)), stored_tensors(shards), iterate_weights(shards)
        else:
            files, stored, tensors = [str(source)], described(state_dict), iter(state_dict.items())
        config.dtype = wanted_dtype or config.dtype or _first_dtype(stored)

        # Tensors made in inference mode could never be trained.
        with torch.inference_mode(False), torch.no_grad():
            with torch.device("meta"):
                model = cls(config) if module is None else cls(config, backbone=module)
            # The files' headers are compared with the model before memory is allocated for it.
            places, info = _compare(model, stored, files)
            if conversion is not None:
                info["missing_keys"] = {n for n in info["missing_keys"] if not n.startswith(conversion.initialised)}
                if not config_overrides and all(value is None for value in labels.values()):
                    check_conversion(model, conversion, str(source))
            if info["mismatched_keys"] and not ignore_mismatched_sizes:
                raise RuntimeError(_shapes_message(source, info["mismatched_keys"]))
            if not output_loading_info:
                _refuse_parts(model, stored, files, info, ignore_mismatched_sizes)
            unset = _allocate(model, config.dtype, target)
            loaded = _copy_weights(model, tensors, places)
            if unset - loaded:
                model.initialize(unset - loaded)
        model._mark_initialized()
        model.eval()
        _warn(source, info)
        # As in Transformers, the return type is the usual case's.
        return (model, info) if output_loading_info else model  # type: ignore[return-value]

    @classmethod
    def _from_config(
        cls: type[Model],
        config: Any,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> Model:
        """Build a model with random weights, in a dtype; `from_config` of Transformers' Auto classes calls it.

        Args:
            config: the configuration.
            dtype: a `torch.dtype` or its name; the configuration's dtype if None.
            torch_dtype: the older name of `dtype`.
            **kwargs: arguments of Transformers without an effect here, as in `from_pretrained`.

        Raises:
            TypeError: an argument is unknown or not supported.
        """
        take_arguments(cls.__name__, kwargs, HubOptions())
        if kwargs:
            raise TypeError(f"{cls.__name__}._from_config has no argument {', '.join(kwargs)}")
        model = cls(config)
        model.config.dtype = _wanted_dtype(dtype, torch_dtype) or model.config.dtype or model.dtype
        return model.to(dtype=model.config.dtype)

    def save_pretrained(
        self,
        save_directory: StrPath,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        *,
        safe_serialization: bool = True,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write config.json and the weights; Transformers 4.56 and 5.x read them as well.

        Each file is written beside its place and then moved there; the weights are moved when all of them are written.
        A save that fails leaves the folder's older weights intact. Weight files of an older save that do not belong to
        the checkpoint are then removed. The folder may be the one that the model was loaded from.

        Args:
            save_directory: the folder; made if it is missing.
            is_main_process: False to do nothing: in distributed training only one process should save.
            state_dict: written in place of `self.state_dict()`.
            safe_serialization: False for a pickle, `pytorch_model.bin`.
            max_shard_size: the largest size of a file, in bytes or as "500MB". Larger weights are divided among
                several files with an index.
            variant: the middle of the files' names, "fp16" for `model.fp16.safetensors`.
            push_to_hub: also upload the files.
            **kwargs: with `push_to_hub`, `repo_id` (by default the folder's name) and the other arguments of the
                method `push_to_hub`. Transformers' `save_function`, `save_peft_format` and `save_original_format` are
                accepted and have no effect.

        Raises:
            NotADirectoryError: `save_directory` is a file.
            CheckpointError: a file could not be written, or a tensor has no values.
            OSError: the folder is not writable.
            TypeError: an argument is unknown.
        """
        for name in ("save_function", "save_peft_format", "save_original_format"):
            kwargs.pop(name, None)
        if not push_to_hub:
            kwargs.pop("token", None)
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained has no argument {', '.join(kwargs)}, or only with push_to_hub=True")
        if not is_main_process:
            return
        folder = Path(save_directory)
        repo_id = kwargs.pop("repo_id", folder.absolute().name)
        files = self._save(folder, state_dict, safe_serialization, max_shard_size, variant)
        if push_to_hub:
            kwargs.setdefault("commit_message", "Upload model")
            tags = self._all_tags(kwargs.pop("tags", ()))
            upload(folder, [CONFIG_NAME, *files.names], repo_id, replaced=files.replaced, tags=tags, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        tags: Sequence[str] | str = (),
    ) -> str:
        """Upload config.json and the weights to a Hub repository; it is made if it is missing.

        Args:
            repo_id: "name" or "organization/name".
            commit_message: of the commit.
            commit_description: of the commit.
            private: whether a new repository is private; the account's default if None.
            token: the token; True or None for the token that `hf auth login` stored.
            revision: the branch; made if it is missing.
            create_pr: open a pull request instead of committing.
            max_shard_size: the largest size of a file, as in `save_pretrained`.
            variant: the middle of the files' names, as in `save_pretrained`.
            tags: tags that the model card gets, besides those of `add_model_tags`.

        Returns:
            The commit's URL.

        Raises:
            OSError: the Hub refused the request.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = self._save(Path(folder), None, True, max_shard_size, variant)
            return upload(
                Path(folder),
                [CONFIG_NAME, *files.names],
                repo_id,
                replaced=files.replaced,
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                tags=self._all_tags(tags),
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def _all_tags(self, tags: Sequence[str] | str) -> list[str]:
        return [*(self.model_tags or ()), *([tags] if isinstance(tags, str) else tags)]

    def _save(
        self,
        folder: Path,
        state_dict: Mapping[str, torch.Tensor] | None,
        safe_serialization: bool,
        max_shard_size: int | str,
        variant: str | None,
    ) -> WeightFiles:
        """Write config.json and the weights; return the weights' files."""
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; save_pretrained writes a folder")
        on_disk = _names_on_disk(self)
        state_dict = self.state_dict() if state_dict is None else state_dict
        tensors = as_independent({on_disk.get(name, name): tensor for name, tensor in state_dict.items()})
        files = split_weights(tensors, safe_serialization, max_shard_size, variant)
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        config.dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)

        folder.mkdir(parents=True, exist_ok=True)
        with atomic_weights(folder, tensors, files):
            config.save_pretrained(folder)
        remove_replaced(folder, files)
        return files


# ----------------------------------------------------------------------------------------- the steps of from_pretrained


def _converted(cls: type[PretrainedMixin], source: StrPath, options: Mapping[str, Any] | None) -> Conversion:
    """Convert the checkpoint of another library, and log what was chosen.

    Raises:
        CheckpointError: it cannot be converted, or is no model of this class.
    """
    from fastuper.weights.convert import read_converted  # every dialect, which other models need not load

    conversion = read_converted(source, options)
    if conversion.kind != cls.config_class.model_type:
        remedy = "load it with the class of that model"
        if conversion.kind == "backbone":
            remedy = (
                "write it to a folder by `fastuper convert`, and build the model from UperNetConfig(backbone=FOLDER, "
                "use_pretrained_backbone=True)"
            )
        raise CheckpointError(f"{source} is {conversion.dialect}, no {cls.__name__}; {remedy}")
    if conversion.notes:
        logger.warning("%s (%s): %s", source, conversion.dialect, "; ".join(conversion.notes))
    return conversion


def check_conversion(model: nn.Module, conversion: Conversion, place: str) -> list[str]:
    """Check that a conversion fills a model; see `check_filled`.

    Args:
        model: the model, which may be on the meta device.
        conversion: the conversion.
        place: the checkpoint, for messages.

    Returns:
        The names of the tensors that get initial values.

    Raises:
        CheckpointError: it does not, or holds integers in place of weights; the message names tensors.
    """
    from fastuper.weights.convert import check_filled

    tensors = _own_tensors(model)
    own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = getattr(model, "config", None)
    names = (
        checkpoint_names(getattr(config, "model_type", "")) if conversion.kind == "backbone" else backbone_names(model)
    )
    initial = check_filled(place, conversion, own, [name for name in own if names.is_computed(name)])
    sources = {target: row.source for row in conversion.rows for target in row.targets}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and name in sources and conversion.tensors[name].dtype not in FLOATING.values():
            raise _no_weights(place, sources[name])
    return initial


def _no_weights(place: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{place}: {name} holds no float16, bfloat16, float32 or float64; quantised weights are not supported: load "
        "the checkpoint that they were made from"
    )


def _wanted_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that the caller names; None for "auto"."""
    named = [as_dtype(name) for name in (dtype, torch_dtype) if name is not None and name != "auto"]
    if dtype is not None and torch_dtype is not None and (len(named) == 1 or len(set(named)) > 1):
        raise ValueError(
            f"dtype={dtype!r} and torch_dtype={torch_dtype!r} disagree; torch_dtype is the older name: leave it out"
        )
    return named[0] if named else None


def _build_config(
    cls: type[PretrainedMixin], given: Any, options: HubOptions, labels: dict[str, Any], overrides: dict[str, Any]
) -> Any:
    """Return a new configuration of this library, with the labels and overrides."""
    if isinstance(given, str | os.PathLike):
        hub = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        config = cls.config_class.from_pretrained(given, **hub)
    else:
        config = cls.config_class.from_dict(given if isinstance(given, Mapping) else given.to_dict())
    unknown = [name for name in overrides if name.startswith("_") or not hasattr(config, name)]
    if unknown:
        raise TypeError(
            f"{cls.__name__}.from_pretrained has no argument {', '.join(unknown)}, "
            f"and {type(config).__name__} has no such attribute"
        )
    changes = {name: value for name, value in labels.items() if value is not None} | overrides
    return cls.config_class.from_dict(config.to_dict(), **changes) if changes else config


def _first_dtype(stored: Mapping[str, Stored]) -> torch.dtype:
    """Return the dtype of the first floating-point tensor; without one, PyTorch's default dtype."""
    return next((tensor.dtype for tensor in stored.values() if tensor.dtype is not None), torch.get_default_dtype())


def _device(device: torch.device | str | int | None, device_map: Any) -> torch.device:
    """Return the device of the whole model."""
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, Mapping) or (device is not None and device_map is not None):
        raise ValueError("the whole model goes to one device: pass device=, and no device_map=")
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = device_map if device is None else device
    if type(torch.empty(0)) is not torch.Tensor or (chosen is None and torch.get_default_device().type == "meta"):
        raise RuntimeError(
            "from_pretrained was called where new tensors have no values (torch.device('meta'), FakeTensorMode): it "
            "would give a model without weights. Call it outside, or build the model from its configuration there"
        )
    return torch.get_default_device() if chosen is None else torch.device(chosen)


def _allocate(model: nn.Module, dtype: torch.dtype, device: torch.device) -> set[str]:
    """Move a model from the meta device to a device, in a dtype; return the names of its tensors without values.

    Backbones of other libraries are built with values, and their tensors are not among the names.

    Raises:
        RuntimeError: the model exceeds the device's memory.
    """
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
    check_memory(sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in tensors), device)
    allocated: dict[torch.Tensor, torch.Tensor] = {}  # a tensor that two modules share stays shared
    unset = set()
    for prefix, module in model.named_modules():
        tables: tuple[dict[str, Any], ...] = (parameters_of(module), buffers_of(module))
        for table in tables:
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if tensor not in allocated:
                    wanted = dtype if tensor.is_floating_point() else None
                    empty = torch.empty_like(tensor, device=device, dtype=wanted)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    allocated[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                table[name] = allocated[tensor]
                unset.add(f"{prefix}.{name}" if prefix else name)
    model.to(device=device, dtype=dtype)
    return unset


def _own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}


def _compare(
    model: nn.Module, stored: Mapping[str, Stored], files: Sequence[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Compare the tensors in a checkpoint's files with a model's; no values are read.

    Returns:
        The model's name of each tensor that fits, by its name in the files, and the loading info.

    Raises:
        CheckpointError: no tensor of the checkpoint belongs to the model, or one holds integers in place of weights.
    """
    own = _own_tensors(model)
    names_of: dict[torch.Tensor, set[str]] = {}
    for name, tensor in own.items():
        names_of.setdefault(tensor, set()).add(name)
    names = backbone_names(model)
    renamed = {theirs: ours for ours, theirs in _names_on_disk(model).items()}
    places: dict[str, str] = {}
    loaded: set[str] = set()
    unexpected: set[str] = set()
    mismatched: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
    for theirs, there in stored.items():
        ours = theirs if theirs in own else renamed.get(theirs) or hub_name(theirs, names)
        if ours is None:
            continue
        if ours not in own:
            unexpected.add(theirs)
        elif there.shape != own[ours].shape:
            mismatched.add((ours, there.shape, tuple(own[ours].shape)))
        elif own[ours].is_floating_point() and there.dtype is None:
            raise _no_weights(_place(files), theirs)
        else:
            places[theirs] = ours
            loaded |= names_of[own[ours]]
    if not loaded and not mismatched:
        raise CheckpointError(
            f"{_place(files)}: these are not UPerNet weights of this kind; their names are "
            f"{listed(sorted(unexpected))} and the model's {listed(own)}: {describe(stored, own)}"
        )
    missing = own.keys() - loaded - {name for name, _, _ in mismatched}
    return places, {
        "missing_keys": {name for name in missing if not names.is_computed(name)},
        "unexpected_keys": unexpected,
        "mismatched_keys": mismatched,
        "error_msgs": [],
    }


def _refuse_parts(
    model: nn.Module, stored: Mapping[str, Stored], files: Sequence[str], info: Mapping[str, Any], new_heads: bool
) -> None:
    """Refuse a checkpoint that lacks more than the auxiliary head, which only training needs.

    With `new_heads` it may also lack the head, a classifier, the head of a task or the norms of the backbone's outputs,
    each as a whole.

    Raises:
        CheckpointError: the message counts the missing tensors, and says whose names the checkpoint has.
    """
    own = _own_tensors(model)
    # Converted checkpoints may lack the counters of BatchNorm, which no result depends on.
    counted = {name for name in own if name.startswith(PARTS) and not name.endswith("num_batches_tracked")}
    missing = counted & info["missing_keys"]
    lacking, whole = Counter(map(_part, missing)), Counter(map(_part, counted))
    only_heads = all(part != "backbone" and number == whole[part] for part, number in lacking.items())
    if only_heads and (new_heads or all(part.startswith("auxiliary_head") for part in lacking)):
        return
    message = (
        f"{_place(files)}: {len(missing)} of the model's {len(counted)} tensors are missing, such as "
        f"{listed((name for name in own if name in missing), 2)}"
    )
    if only_heads:
        raise CheckpointError(f"{message}; pass ignore_mismatched_sizes=True to initialise them newly")
    unknown = info["unexpected_keys"]
    extra = f", and {len(unknown)} in the file are unknown, such as {listed(sorted(unknown), 2)}" if unknown else ""
    raise CheckpointError(f"{message}{extra}: {describe(unknown, own)}")


def _place(files: Sequence[str]) -> str:
    """Return the name of the only file, or the folder of several."""
    return files[0] if len(files) == 1 else f"{Path(files[0]).parent} ({len(files)} files)"


PARTS = ("backbone.", "decode_head.", "auxiliary_head.")
"""The parts that every checkpoint is compared in; a checkpoint may lack what a subclass of the model adds."""


def _part(name: str) -> str:
    """Return the part of a model that a tensor belongs to; a checkpoint has all its tensors, or none."""
    first, _, rest = name.partition(".")
    inner = rest.partition(".")[0]
    alone = inner in ("classifier", "hidden_states_norms") or inner.endswith("_head")  # the head of one task
    return f"{first}.{inner}" if alone else first


def _copy_weights(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], places: Mapping[str, str]) -> set[str]:
    """Copy tensors of a checkpoint into a model; return the names of the model's tensors that were set.

    Args:
        model: the model, with memory for its tensors.
        tensors: names and values.
        places: the model's name of each tensor, by its name in the checkpoint.
    """
    own = _own_tensors(model)
    copied = set()
    # Older versions of safetensors make tensors on the default device.
    with torch.device("cpu"):
        for theirs, tensor in tensors:
            if theirs in places:
                target = own[places[theirs]]
                target.copy_(tensor)
                copied.add(id(target))
    return {name for name, tensor in own.items() if id(tensor) in copied}


def _shapes_message(source: StrPath, mismatched: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> str:
    lines = [f"  {name}: {theirs} in the checkpoint, {ours} in the model" for name, theirs, ours in sorted(mismatched)]
    return (
        f"{source}: tensors of the checkpoint have other shapes than the model's; "
        "pass ignore_mismatched_sizes=True to initialise these:\n" + "\n".join(lines)
    )


def _warn(source: StrPath, info: Mapping[str, Any]) -> None:
    """Log a warning for each kind of tensors that did not come from the checkpoint, or were not used."""
    shapes = (f"{name} ({theirs} there, {ours} here)" for name, theirs, ours in sorted(info["mismatched_keys"]))
    for text, names in (
        ("not in the checkpoint, newly initialised", sorted(info["missing_keys"])),
        ("in the checkpoint but not in the model, not used", sorted(info["unexpected_keys"])),
        ("of another shape in the checkpoint, newly initialised", list(shapes)),
    ):
        if names:
            logger.warning("%s: %s: %s", source, text, ", ".join(names))
