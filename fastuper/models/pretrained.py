"""Reading and writing weights: files, shards, `from_pretrained`, `save_pretrained`, `push_to_hub`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import os
import pickle
import re
import sys
import tempfile
import zipfile
from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from huggingface_hub import HfApi, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fastuper.io.files import read_json
from fastuper.io.hub import HubOptions, find_file, pin_revision
from fastuper.models.backbones.registry import checkpoint_names
from fastuper.models.configuration import as_dtype
from fastuper.weights.errors import CheckpointError
from fastuper.weights.transformers import Names, hub_name
from fastuper_kernels.dispatch.files import atomic_path

logger = logging.getLogger("fastuper")

T = TypeVar("T")
Model = TypeVar("Model", bound="PretrainedMixin")
StrPath: TypeAlias = "str | os.PathLike[str]"


# Names of weight files; an index says in which of several files ("shards") a tensor is.
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX = ".index.json"


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


def _some(names: Iterable[str], count: int = 3) -> str:
    """Return the first few names, for a message."""
    names = list(names)
    return (", ".join(names[:count]) + (", ..." if len(names) > count else "")) or "none at all"


# -------------------------------------------------------------------------------------------------------------- reading


def read_weights(
    source: StrPath, options: HubOptions | None = None, variant: str | None = None
) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """Read all tensors of a checkpoint, under the names it has for them.

    Args:
        source: a folder, or the id of a Hub repository.
        options: where on the Hub to look.
        variant: the middle of the files' names, "fp16" for `model.fp16.safetensors`.

    Returns:
        Tensors on the CPU, in their own memory, and the files that they came from.

    Raises:
        CheckpointError: there are no weights, or a file is damaged; the message names it.
    """
    shards = find_weights(source, options, variant)
    return {name: tensor.clone() for name, tensor in iterate_weights(shards)}, list(shards)


def find_weights(
    source: StrPath,
    options: HubOptions | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> dict[Path, set[str]]:
    """Find the files of a checkpoint: safetensors before pickles, one file before shards.

    Args:
        source: a folder, or the id of a Hub repository.
        options: where on the Hub to look.
        variant: the middle of the files' names, "fp16" for `model.fp16.safetensors`.
        use_safetensors: True for safetensors alone, False for pickles alone, None for either.

    Returns:
        For each file the names that the index says are in it, none where there is no index.

    Raises:
        CheckpointError: there are no weights, or an index names a file that is not there.
    """
    names = []
    if use_safetensors is not False:
        names += [SAFETENSORS, SAFETENSORS + INDEX]
    if not use_safetensors:
        names += [PICKLE, PICKLE + INDEX]
    names = [_with_variant(name, variant) for name in names]
    for name in names:
        path = find_file(source, name, options)
        if path is not None:
            return _shards_of(path, source, options) if name.endswith(".json") else {path: set()}
    place = f"{source}/{options.subfolder}" if options is not None and options.subfolder else f"{source}"
    remedy = "leave out variant=" if variant else "give the folder or repository that has one of them"
    if use_safetensors is not None:
        remedy += ", or leave out use_safetensors="
    if not Path(source).is_dir():
        remedy += "; where the Hub was not reached, only its cache was looked into"
    raise CheckpointError(f"{place} has no weights: looked for {', '.join(names)}; {remedy}")


def iterate_weights(shards: Mapping[Path, set[str]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of the files that `find_weights` found, one file open at a time.

    The tensors are windows into the files: copy what is to stay, for the file may be overwritten.

    Raises:
        CheckpointError: a file is damaged, or lacks a tensor that the index says is in it.
    """
    for path, promised in shards.items():
        found = set()
        for name, tensor in _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path):
            found.add(name)
            yield name, tensor
        if promised - found:
            raise CheckpointError(
                f"{path} lacks {_some(sorted(promised - found))}, which the index says it holds; "
                "index and file are of different checkpoints: fetch both again"
            )


def _with_variant(filename: str, variant: str | None) -> str:
    """Put the variant where Transformers puts it: before the last extension."""
    stem, dot, extension = filename.rpartition(".")
    return f"{stem}.{variant}{dot}{extension}" if variant else filename


def _shards_of(index: Path, source: StrPath, options: HubOptions | None) -> dict[Path, set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map that names a file for each tensor; fetch it again")
    names: dict[str, set[str]] = {}
    for tensor, filename in weight_map.items():
        names.setdefault(filename, set()).add(tensor)
    shards = {}
    for filename, promised in names.items():
        if Path(filename).name != filename or Path(filename).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(f"{index} names {filename!r}, which is not a weight file beside it")
        path = find_file(source, filename, options)
        if path is None:
            raise CheckpointError(f"{index} names {filename}, which is not there; fetch the missing file")
        shards[path] = promised
    return shards


def _check_file(path: Path) -> None:
    """Recognise what is often found in the place of a weight file."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path} is empty; fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")


def _read_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    _check_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118  (the file itself cannot be iterated)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); fetch it again") from None


def _read_pickle(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    _check_file(path)
    try:
        # Before PyTorch 1.6 the file was no zip archive, and such a one cannot be mapped into memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if not re.search(r"GLOBAL|global|reduce|NEWOBJ|can only (create|build)", str(error), re.IGNORECASE):
            raise CheckpointError(f"{path} is damaged ({_reason(error)}); fetch it again") from None
        raise CheckpointError(
            f"{path} wants to run code on loading ({_reason(error)}); it was not run. "
            "Ask whoever made it for model.safetensors, or convert it where you trust it"
        ) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what it is (AssertionError, struct.error, ...) depends on where the damage is
        raise CheckpointError(f"{path} is truncated or damaged ({_reason(error)}); fetch it again") from None
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds something else than a dict of tensors; save `model.state_dict()`")
    yield from content.items()


def _reason(error: Exception) -> str:
    """Return the sentence of torch.load's long message that says what was wrong."""
    text = str(error)
    match = re.search(r"WeightsUnpickler error:\s*([^\n]+)", text)
    return (match.group(1) if match else text.split("\n")[0]).split(". ")[0].strip() or type(error).__name__


# --------------------------------------------------------------------------------------------- from_pretrained and back

# Arguments that Transformers has and we have not: what to do instead.
REFUSED = {
    "force_download": "delete the repository from the Hub's cache",
    "from_flax": "convert the checkpoint to safetensors first",
    "from_tf": "convert the checkpoint to safetensors first",
    "gguf_file": "convert the checkpoint to safetensors first",
    "key_mapping": "rename the state dict and pass it to load_state_dict",
    "load_in_4bit": "quantised weights are not supported; dtype=torch.bfloat16 halves the memory",
    "load_in_8bit": "quantised weights are not supported; dtype=torch.bfloat16 halves the memory",
    "max_memory": "the whole model goes to one device: pass device=",
    "offload_folder": "the whole model goes to one device: pass device=",
    "proxies": "set the environment variable HTTPS_PROXY",
    "quantization_config": "quantised weights are not supported; dtype=torch.bfloat16 halves the memory",
    "state_dict": "build the model from its config and call load_state_dict",
    "trust_remote_code": "code of a repository is never run; leave it out",
    "use_auth_token": "pass token=",
}


class KnownToTransformers:
    """What Transformers takes for one of its own models, once it is imported; everything else sees the class as it is.

    Its Trainer writes config.json beside the weights for instances of `PreTrainedModel` alone, so that what it saved of
    any other module could not be loaded.
    """

    @property
    def __class__(self) -> type[Any]:  # what `isinstance` asks for beside the type
        theirs = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
        cls: Any = type(self)
        return cls if theirs is None or issubclass(cls, theirs) else _related(cls, theirs)

    @__class__.setter
    def __class__(self, cls: type[Any]) -> None:  # FSDP and parametrizations derive classes of their own
        object.__dict__["__class__"].__set__(self, cls)

    # What PEFT asks of a `PreTrainedModel`.
    _keys_to_ignore_on_save = None

    def is_custom_code(self) -> bool:
        """Return True: names of modules are the Hub's, and are not to be translated."""
        return True

    def get_output_embeddings(self) -> None:
        """Return None: there are no token embeddings."""
        return None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Python's own way of making the object anew compares its type with its class.
        return _new, (type(self),), object.__reduce_ex__(self, 2)[2]


@functools.cache
def _related(cls: Hashable, theirs: Hashable) -> Any:
    assert isinstance(cls, type)
    assert isinstance(theirs, type)

    def new(_: Any, *args: Any, **kwargs: Any) -> Any:  # `model.__class__(config)` builds what the model is
        return cls(*args, **kwargs)

    return type(cls.__name__, (cls, theirs), {"__module__": cls.__module__, "__doc__": cls.__doc__, "__new__": new})


def _new(cls: type[T]) -> T:
    return cls.__new__(cls)


class PretrainedMixin(KnownToTransformers, nn.Module):
    """`from_pretrained`, `save_pretrained` and `push_to_hub`, as `transformers.PreTrainedModel` has them.

    The class that inherits it is built by `cls(config)`, has the attributes below, and a method
    `initialize(names)` that gives initial values to the parameters and buffers of these full names.

    Attributes:
        config_class: has `from_pretrained` and `from_dict`; its objects have `to_dict` and `save_pretrained`.
        config: the model's configuration.
    """

    config_class: ClassVar[Any]
    config: Any

    def initialize(self, names: set[str] | None = None) -> None:
        """Give the parameters and buffers of these names (all of them where None) their initial values, in place."""
        raise NotImplementedError(f"{type(self).__name__} has no initialize(names)")

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: StrPath,
        *,
        config: Any = None,
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
        device_map: torch.device | str | int | Mapping[str, Any] | None = None,
        use_safetensors: bool | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **config_overrides: Any,
    ) -> Model:
        """Load a checkpoint of a folder or a Hub repository, in evaluation mode.

        Tensors that the checkpoint lacks are freshly initialised; a warning lists them, and those that it has too many.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a Hub repository.
            config: a configuration to use instead of the checkpoint's: ours, Transformers', a dictionary, or the
                folder or repository that has it.
            dtype: a `torch.dtype`, its name, or "auto" (also None): the configuration's where it says one, else that of
                the checkpoint's first floating-point tensor.
            torch_dtype: the older name of `dtype`.
            device: where to put the model; the default device where None.
            num_labels: the number of classes, where it is not the checkpoint's.
            id2label: the names of the classes.
            label2id: the inverse of `id2label`, made from it where None.
            token: for private repositories; True for the one that `hf auth login` stored.
            cache_dir: the Hub's cache.
            subfolder: where in the folder or repository the checkpoint is.
            revision: a branch, tag or commit of the repository.
            variant: the middle of the files' names, "fp16" for `model.fp16.safetensors`.
            local_files_only: take what the cache has and never ask the Hub.
            device_map: Transformers' name of `device`: a device, {"": device}, or "auto" for a GPU where there is one.
            use_safetensors: True never to open a pickle (.bin), False to open nothing else.
            ignore_mismatched_sizes: freshly initialise tensors whose shape is not the checkpoint's (the classifier,
                where the number of classes is another) instead of failing.
            output_loading_info: also return what was missing, unexpected and of another shape.
            **config_overrides: attributes of the configuration to change, such as `loss_ignore_index=0`. Arguments of
                Transformers that change nothing here (`low_cpu_mem_usage`, `attn_implementation="sdpa"`) are accepted.

        Returns:
            The model; with `output_loading_info=True`, it and a dictionary: `missing_keys` and `unexpected_keys`, sets
            of names, `mismatched_keys`, a set of (name, shape in the checkpoint, shape in the model), and `error_msgs`.

        Raises:
            CheckpointError: there are no weights, a file of them is damaged, or they are not a UPerNet's.
            OSError: there is no such folder, repository or revision, or it has no config.json.
            RuntimeError: tensors have another shape than the checkpoint's; the message lists them.
            TypeError: the configuration has no attribute of this name; the message says what to do instead.
            ValueError: `dtype` is not one, or `torch_dtype` contradicts it.
        """
        source = pretrained_model_name_or_path
        _refuse(cls, config_overrides)
        wanted_dtype = _wanted_dtype(dtype, torch_dtype)
        options = HubOptions(token, cache_dir, subfolder or "", revision, local_files_only)
        if config is None:
            options = pin_revision(source, options)
        labels = {"num_labels": num_labels, "id2label": id2label, "label2id": label2id}
        config = _build_config(cls, source if config is None else config, options, labels, config_overrides)
        config.name_or_path = str(source)

        shards = find_weights(source, options, variant, use_safetensors)
        config.dtype = wanted_dtype or config.dtype or _first_dtype(shards)
        target = _device(device, device_map)
        # Weights made in inference mode could never be trained.
        with torch.inference_mode(False), torch.no_grad():
            with torch.device("meta"):
                model = cls(config)
            fresh = _materialise(model, target, config.dtype)
            # Older safetensors make tensors where the caller's `with torch.device(...)` says.
            with torch.device("cpu"):
                loaded, info = _copy_weights(model, shards)
            mismatched = sorted(info["mismatched_keys"])
            if mismatched and not ignore_mismatched_sizes:
                raise RuntimeError(
                    f"{source}: the checkpoint has other shapes than the model; "
                    "pass ignore_mismatched_sizes=True to initialise these freshly:\n"
                    + "\n".join(
                        f"  {name}: {theirs} in the checkpoint, {ours} here" for name, theirs, ours in mismatched
                    )
                )
            if fresh - loaded:
                model.initialize(fresh - loaded)
        model.eval()

        if info["missing_keys"]:
            logger.warning(
                "%s: not in the checkpoint, and freshly initialised: %s",
                source,
                ", ".join(sorted(info["missing_keys"])),
            )
        if info["unexpected_keys"]:
            logger.warning(
                "%s: in the checkpoint but not in the model, and left out: %s",
                source,
                ", ".join(sorted(info["unexpected_keys"])),
            )
        if mismatched:
            logger.warning(
                "%s: of another shape in the checkpoint, and freshly initialised: %s",
                source,
                ", ".join(f"{name} ({theirs} there, {ours} here)" for name, theirs, ours in mismatched),
            )
        # As in Transformers, the return type speaks of the usual case alone.
        return (model, info) if output_loading_info else model  # type: ignore[return-value]

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
        """Write config.json and the weights, which Transformers 4.56 and 5.x read as well.

        Each file is written beside its place and then moved there, the weights only when all of them are written: a
        save that fails leaves the folder's older checkpoint as it was. Files of an older save that no longer belong to
        the checkpoint are then removed. The folder may be the one that the model was loaded from.

        Args:
            save_directory: the folder, made where it is missing.
            is_main_process: False to do nothing, as every process but one should of a distributed training.
            state_dict: what to write instead of `self.state_dict()`.
            safe_serialization: False for a pickle, `pytorch_model.bin`.
            max_shard_size: where the weights are more than this, in bytes or as "500MB", they are split into several
                files with an index.
            variant: the middle of the files' names, "fp16" for `model.fp16.safetensors`.
            push_to_hub: also upload what was written.
            **kwargs: `repo_id` (the folder's name where it is not given) and the other arguments of `push_to_hub`.
                `save_function` of Transformers is accepted, and not called: safetensors does the writing.

        Raises:
            NotADirectoryError: `save_directory` is a file.
            CheckpointError: a file could not be written, or a tensor has no values.
            OSError: the folder cannot be written to.
        """
        kwargs.pop("save_function", None)
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained has no argument {', '.join(kwargs)}, or only with push_to_hub=True")
        if not is_main_process:
            return
        folder = Path(save_directory)
        repo_id = kwargs.pop("repo_id", folder.absolute().name)
        written, replaced = self._save(folder, state_dict, safe_serialization, max_shard_size, variant)
        if push_to_hub:
            _upload(folder, written, replaced, repo_id, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
    ) -> str:
        """Upload config.json and the weights to a Hub repository, made where it is missing.

        Args:
            repo_id: "name" or "organization/name".
            commit_message: of the commit.
            private: whether a new repository is private; the account's default where None.
            token: True, or None, for the one that `hf auth login` stored.
            revision: the branch, made where it is missing.
            create_pr: open a pull request instead of committing.
            max_shard_size: see `save_pretrained`.
            variant: see `save_pretrained`.

        Returns:
            The commit's URL.

        Raises:
            OSError: the Hub refused it.
        """
        with tempfile.TemporaryDirectory() as folder:
            written, replaced = self._save(Path(folder), None, True, max_shard_size, variant)
            return _upload(
                Path(folder),
                written,
                replaced,
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def _save(
        self,
        folder: Path,
        state_dict: Mapping[str, torch.Tensor] | None,
        safe_serialization: bool,
        max_shard_size: int | str,
        variant: str | None,
    ) -> tuple[list[str], list[str]]:
        """Write everything; return the names of the files, and patterns of those whose place they take."""
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; save_pretrained writes a folder")
        on_disk = _names_on_disk(self)
        state_dict = self.state_dict() if state_dict is None else state_dict
        tensors = _own_storage({on_disk.get(name, name): tensor for name, tensor in state_dict.items()})
        kind = SAFETENSORS if safe_serialization else PICKLE
        index = _with_variant(kind + INDEX, variant)
        split = split_torch_state_dict_into_shards(
            tensors,
            filename_pattern="{suffix}.".join(_with_variant(kind, variant).rsplit(".", 1)),
            max_shard_size=max_shard_size,
        )
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        config.dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)

        folder.mkdir(parents=True, exist_ok=True)
        # On leaving it, and only if all is well, every file is moved to its place.
        with contextlib.ExitStack() as moves:
            if split.is_sharded:
                content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                path = moves.enter_context(atomic_path(folder / index))  # entered first, moved last
                path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            for filename, names in split.filename_to_tensors.items():
                path = moves.enter_context(atomic_path(folder / filename))
                _write(path, {name: tensors[name] for name in names}, folder / filename)
            config.save_pretrained(folder)
        written = [*split.filename_to_tensors, *([index] if split.is_sharded else [])]
        # Safetensors are read first, so those of an older save would hide a pickle.
        replaced = [glob for k in {kind, SAFETENSORS} for glob in _globs(k, variant)]
        for path in folder.iterdir():
            if path.name not in written and any(fnmatchcase(path.name, glob) for glob in replaced):
                path.unlink()
        return ["config.json", *written], replaced


def _refuse(cls: type, kwargs: dict[str, Any]) -> None:
    """Take Transformers' arguments out of `kwargs`, or say what to do instead."""
    kwargs.pop("low_cpu_mem_usage", None)  # always so
    kwargs.pop("_fast_init", None)
    attention = kwargs.pop("attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        raise TypeError(f"attn_implementation={attention!r} is not supported; leave it out")
    if not kwargs.pop("weights_only", True):
        raise TypeError("weights_only=False is not supported: code in a pickle is never run; leave it out")
    for name, remedy in REFUSED.items():
        value = kwargs.pop(name, None)
        if value is not None and value is not False:
            raise TypeError(f"{cls.__name__}.from_pretrained has no {name}: {remedy}")


def _device(device: torch.device | str | int | None, device_map: Any) -> torch.device:
    """Return where the whole model goes."""
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, Mapping) or (device is not None and device_map is not None):
        raise ValueError("the whole model goes to one device: pass device=, and no device_map=")
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = device_map if device is None else device
    return torch.get_default_device() if chosen is None else torch.device(chosen)


def _build_config(
    cls: type[PretrainedMixin], given: Any, options: HubOptions, labels: dict[str, Any], overrides: dict[str, Any]
) -> Any:
    """Return a configuration of our own that nobody else holds, with what is to be changed changed."""
    if isinstance(given, str | os.PathLike):
        hub = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        config = cls.config_class.from_pretrained(given, **hub)
    else:
        config = cls.config_class.from_dict(given if isinstance(given, Mapping) else given.to_dict())
    unknown = [name for name in overrides if name.startswith("_") or not hasattr(config, name)]
    if unknown:
        raise TypeError(
            f"{cls.__name__}.from_pretrained has no argument {', '.join(unknown)}, "
            f"and {type(config).__name__} no such attribute"
        )
    changes = {name: value for name, value in labels.items() if value is not None} | overrides
    return cls.config_class.from_dict(config.to_dict(), **changes) if changes else config


def _wanted_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    named = [as_dtype(name) for name in (dtype, torch_dtype) if name is not None and name != "auto"]
    if dtype is not None and torch_dtype is not None and (len(named) == 1 or len(set(named)) > 1):
        raise ValueError(
            f"dtype={dtype!r} and torch_dtype={torch_dtype!r} disagree; torch_dtype is the older name: leave it out"
        )
    return named[0] if named else None


def _first_dtype(shards: Mapping[Path, set[str]]) -> torch.dtype:
    """Return the dtype of the first floating-point tensor; where there is none, PyTorch's default."""
    floating = (tensor.dtype for _, tensor in iterate_weights(shards) if tensor.is_floating_point())
    return next(floating, torch.get_default_dtype())


def _materialise(model: nn.Module, device: torch.device, dtype: torch.dtype) -> set[str]:
    """Give memory to what is on the meta device, and move the rest; floating-point tensors become `dtype`.

    Returns the names of the tensors that have no values yet. Backbones of other libraries are not among them: those
    are built with values.
    """
    made: dict[torch.Tensor, torch.Tensor] = {}  # a tensor that two modules share stays one
    fresh = set()
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if tensor not in made:
                    empty = torch.empty_like(tensor, device=device, dtype=dtype if tensor.is_floating_point() else None)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                table[name] = made[tensor]
                fresh.add(f"{prefix}.{name}" if prefix else name)
    model.to(device=device, dtype=dtype)
    return fresh


def _copy_weights(model: nn.Module, shards: Mapping[Path, set[str]]) -> tuple[set[str], dict[str, Any]]:
    """Copy the checkpoint into the model; return the names that now have their values, and what did not fit."""
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    names_of: dict[torch.Tensor, set[str]] = {}
    for name, tensor in own.items():
        names_of.setdefault(tensor, set()).add(name)
    names = backbone_names(model)
    renamed = {theirs: ours for ours, theirs in _names_on_disk(model).items()}
    loaded: set[str] = set()
    unexpected: set[str] = set()
    mismatched: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
    for theirs, tensor in iterate_weights(shards):
        ours = theirs if theirs in own else renamed.get(theirs) or hub_name(theirs, names)
        if ours is None:
            continue
        if ours not in own:
            unexpected.add(theirs)
        elif tensor.shape != own[ours].shape:
            mismatched.add((ours, tuple(tensor.shape), tuple(own[ours].shape)))
        else:
            own[ours].copy_(tensor)
            loaded |= names_of[own[ours]]
    if not loaded and not mismatched:
        raise CheckpointError(
            f"{', '.join(map(str, shards))}: these are not UPerNet weights of this kind; their names are "
            f"{_some(sorted(unexpected))} and the model's {_some(own)}"
        )
    missing = own.keys() - loaded - {name for name, _, _ in mismatched}
    return loaded, {
        "missing_keys": {name for name in missing if not names.is_computed(name)},
        "unexpected_keys": unexpected,
        "mismatched_keys": mismatched,
        "error_msgs": [],
    }


def _own_storage(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous tensors that share no memory, as the file formats want them; copies only where needed."""
    tensors = {}
    seen = set()
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            what = "has no values (it is on the meta device)" if isinstance(tensor, torch.Tensor) else "is no tensor"
            raise CheckpointError(f"{name} {what} and cannot be saved; pass a full state_dict=")
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        # Two names of one tensor are written twice, so that no reader misses one; a view would drag its base along.
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _write(path: Path, tensors: dict[str, torch.Tensor], place: Path) -> None:
    """Write a weight file to `path`, which is to be moved to `place`."""
    try:
        if path.suffix == ".safetensors":
            path.touch()
            mode = path.stat().st_mode
            save_file(tensors, path, metadata={"format": "pt"})
            path.chmod(mode)  # safetensors 0.8 makes files that nobody else may read
        else:
            torch.save(tensors, path)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{place} could not be written (is the disk full?): {error}") from error


def _globs(kind: str, variant: str | None) -> list[str]:
    """Return patterns of the files that a checkpoint of this kind may consist of."""
    stem, extension = _with_variant(kind, variant).rsplit(".", 1)
    number = "[0-9]" * 5
    index = _with_variant(kind + INDEX, variant)
    return [f"{stem}.{extension}", f"{stem}-{number}-of-{number}.{extension}", index]


def _upload(
    folder: Path,
    written: list[str],
    replaced: list[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload these files of a folder, in place of the repository's that match `replaced`; return the commit's URL."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=written,
        delete_patterns=replaced,
        commit_message=commit_message or "Upload model",
        revision=revision,
        create_pr=create_pr,
    )
    return commit.commit_url
