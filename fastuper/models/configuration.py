"""The base of all configurations: `Config`, `BackboneConfig`, `ForeignBackboneConfig`, config.json and the checks.

A backbone's own configuration is in its file in `fastuper/models/backbones`, UPerNet's in `upernet_configuration.py`.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from fastuper.io.arguments import take_arguments
from fastuper.io.bounds import DEEPEST, check_bounds, check_foreign_bounds, plain
from fastuper.io.files import read_json
from fastuper.io.hub import CONFIG_NAME, HubOptions, find_file
from fastuper.io.messages import shown
from fastuper.models.config_methods import ConfigMethods
from fastuper.weights.reading import FLOATING

logger = logging.getLogger(__name__)

# Values that describe the same thing. Overriding one of them removes the saved values of the others.
LABELS = ("id2label", "label2id", "num_labels", "palette")
LEVELS = ("out_features", "out_indices")
LINKED = {
    "id2label": LABELS,
    "num_labels": LABELS,
    "out_features": LEVELS,
    "out_indices": LEVELS,
    "torch_dtype": ("dtype",),
    "stem_widths": ("stem_widths", "embedding_size"),
}


# Libraries by a key of their config.json files, which have no model_type.
LIBRARIES = {
    "encoder_name": "segmentation_models_pytorch",
    "pretrained_cfg": "timm",
    "architecture": "timm",
    "_class_name": "diffusers",
}


class Config(ConfigMethods):
    """Base of all configurations, with the arguments, defaults and config.json of Transformers' classes.

    Args:
        return_dict: True if `forward` returns an output object, False for a tuple.
        output_hidden_states: True if `forward` returns the hidden states by default.
        output_attentions: True if `forward` returns the attention weights by default.
        dtype: the dtype of the weights, a `torch.dtype` or its name ("bfloat16").
        torch_dtype: the older name of `dtype`.
        id2label: the name of each class. Keys may be strings, as in JSON.
        label2id: the inverse of `id2label`; derived from it if None.
        num_labels: the number of classes, if `id2label` is None; 2 if both are.
        **extra: any other value of a config.json is kept as an attribute, and written back.

    Raises:
        ValueError: `dtype` is not a floating-point dtype, or the classes are not valid.
    """

    model_type: ClassVar[str] = ""
    other_model_types: ClassVar[tuple[str, ...]] = ()  # more values of "model_type" in files of this class

    def __init__(
        self,
        *,
        return_dict: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        id2label: Mapping[Any, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        num_labels: int | None = None,
        **extra: Any,
    ):
        self.return_dict = extra.pop("use_return_dict", return_dict)
        self.output_hidden_states = output_hidden_states
        self.output_attentions = output_attentions
        self.dtype = dtype if dtype is not None else torch_dtype
        self.name_or_path = extra.pop("name_or_path", None) or extra.pop("_name_or_path", "")
        self._commit_hash: str | None = extra.pop("_commit_hash", None)  # for the pipelines of Transformers 4.x
        self.architectures: list[str] | None = extra.pop("architectures", None)
        self.task_specific_params: dict[str, Any] | None = extra.pop("task_specific_params", None)
        if id2label is not None:
            self.id2label = _as_id2label(id2label)
            if num_labels is not None and num_labels != len(self.id2label):
                logger.warning(
                    "num_labels=%d disagrees with the %d names of id2label: using %d classes",
                    num_labels,
                    len(self.id2label),
                    len(self.id2label),
                )
            if not isinstance(label2id, Mapping | None):
                raise ValueError(f"label2id must map names to class numbers, got {shown(label2id)}")
            self.label2id = (
                dict(label2id) if label2id is not None else {name: key for key, name in self.id2label.items()}
            )
        else:
            self.num_labels = 2 if num_labels is None else num_labels
        for name in ("model_type", "_name_or_path", "_attn_implementation_autoset", "transformers_version"):
            extra.pop(name, None)
        for name, value in extra.items():
            if name.startswith("__") or callable(getattr(type(self), name, None)):
                raise ValueError(f"{shown(name)} is not a value of a configuration, but part of its class")
            setattr(self, name, value)

    def check(self) -> None:
        """Check all values; attributes may have been set since the configuration was made.

        Raises:
            ValueError: a value is out of its bounds (`fastuper.io.bounds`), or contradicts another.
        """
        check_bounds(vars(self))
        check_bounds({"num_labels": len(self.id2label)})

    @property
    def num_labels(self) -> int:
        """The number of classes. A different number renames the classes LABEL_0, LABEL_1, ..."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        check_bounds({"num_labels": number})
        if len(getattr(self, "id2label", ())) != number:
            self.id2label = {i: f"LABEL_{i}" for i in range(number)}
            self.label2id = {name: i for i, name in self.id2label.items()}

    @property
    def use_return_dict(self) -> bool:
        """`return_dict` under its other name in Transformers 4.x."""
        return self.return_dict

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the weights; a `torch.dtype` or its name may be assigned."""
        return self._dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype | str | None) -> None:
        self._dtype = as_dtype(dtype)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """`dtype` under its older name."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, dtype: torch.dtype | str | None) -> None:
        self.dtype = dtype

    @property
    def name_or_path(self) -> str:
        """The folder or Hub repository that the configuration is from; "" if there is none."""
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, name_or_path: str | os.PathLike[str] | None) -> None:
        self._name_or_path = "" if name_or_path is None else str(name_or_path)

    def to_dict(self) -> dict[str, Any]:
        """Return all values, in types that JSON supports."""
        values = {name: copy.deepcopy(value) for name, value in vars(self).items() if not name.startswith("_")}
        values["model_type"] = self.model_type
        values["dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        values["id2label"] = {str(key): name for key, name in self.id2label.items()}
        values["_name_or_path"] = self.name_or_path
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the values that define the network: all but those that every configuration has by default."""
        defaults = Config().to_dict()
        values = {n: v for n, v in self.to_dict().items() if n not in defaults or v != defaults[n] or n == "model_type"}
        values.pop("_name_or_path", None)
        return values

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the values as JSON: those of `to_diff_dict`, or all of them with `use_diff=False`."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        values.pop("_name_or_path", None)
        return json.dumps(values, indent=2, sort_keys=True, default=_to_json) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json with all values, in the format of Transformers 4.56 and 5.x.

        Args:
            save_directory: the folder; made if it is missing.
            push_to_hub: also upload the file.
            **kwargs: with `push_to_hub`, `repo_id` (by default the folder's name) and the other arguments of the
                method `push_to_hub`.

        Raises:
            NotADirectoryError: `save_directory` is a file.
            TypeError: an argument is unknown.
        """
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained has no argument {', '.join(kwargs)}, or only with push_to_hub=True")
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; save_pretrained writes a folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / CONFIG_NAME, use_diff=False)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.absolute().name), **kwargs)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """Return a configuration with the values of a config.json.

        Args:
            values: the content of config.json.
            return_unused_kwargs: True to return the configuration and a dictionary of the overrides whose names it
                does not have, in place of an error.
            **overrides: replace values of the same names, and values that contradict the overrides. Arguments of
                Transformers' `from_pretrained` are accepted at the values that do nothing.

        Raises:
            TypeError: the configuration has no value of an override's name.
            ValueError: a value is not valid.
        """
        config = cls(**copy.deepcopy(dict(values)))
        if not return_unused_kwargs:
            take_arguments(cls.__name__, overrides, HubOptions())
        if overrides.get("num_labels") == config.num_labels:  # the names of the classes stay
            del overrides["num_labels"]
        unknown = [name for name in overrides if name.startswith("_") or not hasattr(config, name)]
        if unknown and not return_unused_kwargs:
            raise TypeError(f"{cls.__name__} has no {', '.join(unknown)}")
        unused = {name: overrides.pop(name) for name in unknown}
        if overrides:
            config = cls(**overridden(config.to_dict(), overrides))
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        subfolder: str = "",
        revision: str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> Any:
        """Read config.json from a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path: the folder, the file itself, or the repository's id.
            token: for private repositories; True for the token that `hf auth login` stored.
            cache_dir: the Hub's cache.
            subfolder: the folder of config.json inside the folder or repository.
            revision: a branch, tag or commit of the repository.
            local_files_only: True to use only the cache.
            force_download: download the file again, even if the cache has it.
            return_unused_kwargs: see `from_dict`.
            **overrides: see `from_dict`.

        Raises:
            OSError: config.json is missing or is not valid JSON; the message names the place.
            TypeError: the configuration has no value of an override's name.
            ValueError: config.json describes another kind of model, or a value is not valid.
        """
        options = HubOptions(token, cache_dir, subfolder or "", revision, local_files_only, force_download)
        if return_unused_kwargs:
            options = replace(options, token=token or overrides.pop("use_auth_token", None))
        else:
            options = take_arguments(cls.__name__, overrides, options)
        path = _find_config(pretrained_model_name_or_path, options)
        values = read_json(path)
        if not cls.reads(values.get("model_type")):
            # The configuration of a whole model may hold one of this class, as a UPerNet's holds its backbone's.
            parts = (part for part in values.values() if isinstance(part, dict))
            values = next((part for part in parts if cls.reads(part.get("model_type"))), values)
        cls._check_file(path, values)
        values = cls._from_file(values)
        try:
            config = cls.from_dict(values)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        unused: dict[str, Any] = {}
        if overrides:  # outside the `try`: an error in an override is not the file's
            config, unused = cls.from_dict(values, return_unused_kwargs=True, **overrides)
            if unused and not return_unused_kwargs:
                raise TypeError(f"{cls.__name__} has no {', '.join(unused)}")
        config.name_or_path = str(pretrained_model_name_or_path)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the content of config.json, and the arguments that are not about finding the file.

        Args:
            pretrained_model_name_or_path: the folder, the file itself, or the repository's id.
            **kwargs: arguments of `from_pretrained`.

        Raises:
            OSError: config.json is missing or is not valid JSON; the message names the place.
        """
        given = {field.name: kwargs.pop(field.name) for field in fields(HubOptions) if field.name in kwargs}
        given["subfolder"] = given.get("subfolder") or ""
        options = take_arguments(cls.__name__, kwargs, HubOptions(**given))
        return read_json(_find_config(pretrained_model_name_or_path, options)), kwargs

    @classmethod
    def reads(cls, model_type: Any) -> bool:
        """Return whether a config.json with this `model_type` is of this class."""
        return model_type in (cls.model_type, *cls.other_model_types)

    @classmethod
    def _from_file(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values of a config.json as the constructor takes them."""
        return values

    @classmethod
    def _check_file(cls, path: Path, values: Mapping[str, Any]) -> None:
        """Refuse the config.json of another kind of model, and of another library."""
        if "model_type" in values:
            if not cls.reads(values["model_type"]):
                raise ValueError(
                    f"{path} describes a {shown(values['model_type'])} model; {cls.__name__} reads {cls.model_type!r}: "
                    "load it with the library that wrote it"
                )
            return
        own = inspect.signature(cls.__init__).parameters
        if own.keys().isdisjoint(values):
            library = next((name for key, name in LIBRARIES.items() if key in values), None)
            origin = f"it was written by {library}" if library else f"it has none of the values of {cls.__name__}"
            raise ValueError(
                f"{path} has no model_type (here {cls.model_type!r}), and {origin}; run `fastuper convert` on its "
                "folder, or load the model with the library that wrote it"
            )

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


class BackboneConfig(Config):
    """Base of our backbones' configurations: the stages, and the selection of the returned stages.

    A subclass has the class attribute `model_type` and the attribute `num_channels`, the channels of an image.

    Args:
        depths: the number of blocks of each stage. The stages are named "stem", "stage1", "stage2", ...
        out_features: names of the stages to return, in order; the last stage if both this and `out_indices` are None.
        out_indices: their indices, 0 for the stem; negative indices count from the end.
        **extra: see `Config`.

    Raises:
        ValueError: a depth is less than 1, or the selection of stages is not valid.
    """

    def __init__(
        self,
        depths: Sequence[int],
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **extra: Any,
    ):
        extra.pop("stage_names", None)
        super().__init__(**extra)
        self.depths = as_list(depths)
        self.check()
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(len(self.depths)))]
        self._select(out_features, out_indices)

    def check(self) -> None:
        """Check all values; see `Config.check`."""
        super().check()
        if sum(self.depths) > DEEPEST:
            raise ValueError(f"depths must be at most {DEEPEST} blocks in all, got {shown(self.depths)}")

    def _select(self, out_features: Sequence[str] | None, out_indices: Sequence[int] | None) -> None:
        names, out_features, out_indices = self.stage_names, plain(out_features), plain(out_indices)
        if not all(value is None or isinstance(value, list | tuple) for value in (out_features, out_indices)):
            raise ValueError(
                f"out_features and out_indices are lists, got {shown(out_features)} and {shown(out_indices)}"
            )
        if out_features is None and out_indices is None:
            out_indices = [len(names) - 1]
        if out_indices is not None and not all(
            isinstance(i, int) and not isinstance(i, bool) and -len(names) <= i < len(names) for i in out_indices
        ):
            raise ValueError(f"out_indices {shown(list(out_indices))} must be indices into the stages {names}")
        features = list(out_features) if out_features is not None else [names[i] for i in out_indices or ()]
        if not features:
            raise ValueError(f"out_features and out_indices must name at least one of the stages {names}")
        if any(name not in names for name in features):
            raise ValueError(f"out_features {shown(features)} must be among the stages {names}")
        if features != [name for name in names if name in features]:
            raise ValueError(f"out_features {shown(features)} must be in the order of the stages {names}, each once")
        if out_indices is not None and features != [names[i] for i in out_indices]:
            raise ValueError(f"out_features {features} and out_indices {list(out_indices)} name different stages")
        self._out_features = features
        self._out_indices = list(out_indices) if out_indices is not None else [names.index(name) for name in features]

    @property
    def out_features(self) -> list[str]:
        """The names of the returned stages; assigning them also sets `out_indices`."""
        return self._out_features

    @out_features.setter
    def out_features(self, out_features: Sequence[str] | None) -> None:
        self._select(out_features, None)

    @property
    def out_indices(self) -> list[int]:
        """The indices of the returned stages; assigning them also sets `out_features`."""
        return self._out_indices

    @out_indices.setter
    def out_indices(self, out_indices: Sequence[int] | None) -> None:
        self._select(None, out_indices)

    def set_output_features_output_indices(
        self, out_features: Sequence[str] | None, out_indices: Sequence[int] | None
    ) -> None:
        """Select the returned stages by names, by indices, or by both if they agree; the last stage if both are None.

        Raises:
            ValueError: the selection is not valid.
        """
        self._select(out_features, out_indices)

    def verify_out_features_out_indices(self) -> None:
        """Check that the names and the indices of the returned stages are valid and agree.

        Raises:
            ValueError: they are not, or do not.
        """
        self._select(self._out_features, self._out_indices)

    def read_all_stages(self) -> None:
        """Select all stages if only the last is selected, for heads that read a pyramid of maps."""
        if self.out_features == self.stage_names[-1:]:
            self.out_features = self.stage_names[1:]

    def to_dict(self) -> dict[str, Any]:
        """Return all values, in types that JSON supports."""
        values = super().to_dict()
        values["out_features"] = list(self._out_features)
        values["out_indices"] = list(self._out_indices)
        return values


class ForeignBackboneConfig(Config):
    """The configuration of a backbone that another library builds.

    Args:
        model_type: "timm_backbone" (with the values `backbone`, a timm model's name, and `out_indices`), or a model
            type of Transformers' `AutoBackbone`. Both may have the value `neck`, "transposed", "resized" or "none": the
            neck over the maps of a vision transformer (`fastuper.models.backbones.foreign.pyramids`).
        **values: all other values of its configuration, unchanged.
    """

    def __init__(self, model_type: str, **values: Any):
        self.model_type = model_type  # type: ignore[misc]
        self.reads_all_stages = False
        self.layers: Any = None  # the layers of the backbone that was built of this, for layer-wise decay
        self.values = {name: plain(value) for name, value in values.items()}
        super().__init__()
        self.check()

    def check(self) -> None:
        """Check all values; see `Config.check`."""
        super().check()
        check_foreign_bounds(self.values)

    def read_all_stages(self) -> None:
        """Select four stages if none or only the last is selected; the backbone does so when it is built."""
        self.reads_all_stages = True

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("values", {})
        if name in values:
            return values[name]
        raise AttributeError(f"the {self.__dict__.get('model_type')!r} configuration has no {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the values and the model type."""
        return {**copy.deepcopy(self.values), "model_type": self.model_type}

    to_diff_dict = to_dict


def _find_config(source: str | os.PathLike[str], options: HubOptions) -> Path:
    """Return the path of config.json; raise OSError that names the place if there is none."""
    if Path(source).is_file():
        return Path(source)
    path = find_file(source, CONFIG_NAME, options)
    if path is None:
        place = f"{source}/{options.subfolder}" if options.subfolder else source
        raise FileNotFoundError(f"{place} has no {CONFIG_NAME}; give a checkpoint's folder or Hub repository")
    return path


def overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with the overrides, and without the values that an override contradicts (see `LINKED`)."""
    replaced = {other for name in overrides for other in LINKED.get(name, (name,))}
    return {**{name: value for name, value in values.items() if name not in replaced}, **overrides}


def as_list(value: Any) -> Any:
    """Return a list of the items of a tuple or a list; `Config.check` refuses all other values."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value


def _as_id2label(id2label: Any) -> dict[int, str]:
    """Return the names of the classes by their numbers.

    Raises:
        ValueError: `id2label` does not map numbers from 0 to names.
    """
    if not isinstance(id2label, Mapping):
        raise ValueError(f"id2label must map class numbers to names, got {shown(id2label)}")
    if not id2label:
        raise ValueError("id2label names no class; leave it out, or give each class a name")
    check_bounds({"num_labels": len(id2label)})
    names: dict[int, str] = {}
    for key, name in id2label.items():
        try:
            number = int(key)
        except (TypeError, ValueError):
            number = -1
        if number < 0 or number in names or not isinstance(name, str):
            raise ValueError(f"id2label must map class numbers to names, each once, got {shown({key: name})}")
        names[number] = name
    return names


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the floating-point dtype of a name ("bfloat16", "torch.bfloat16"), a dtype itself, or None for None.

    Raises:
        ValueError: `dtype` is not a floating-point dtype.
    """
    if dtype is None:
        return None
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or named not in FLOATING.values():
        known = ", ".join(str(known).removeprefix("torch.") for known in FLOATING.values())
        raise ValueError(f"dtype={shown(dtype)} is not a floating-point dtype of a model's weights; {known} are")
    return named


def _to_json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, set | tuple):
        return list(value)
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays, and tensors
        return value.tolist()
    raise TypeError(f"{value!r} cannot be written to {CONFIG_NAME}")
