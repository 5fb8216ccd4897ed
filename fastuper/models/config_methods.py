"""Methods and constants of Transformers' `PretrainedConfig` that our configurations answer too.

`fastuper.models.configuration.Config` has the values, their checks, and config.json.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastuper.io.bounds import BOUNDS, plain
from fastuper.io.files import read_json
from fastuper.io.hub import CONFIG_NAME, upload
from fastuper.models.known_to_transformers import KnownToTransformers
from fastuper_kernels.dispatch.files import atomic_path


class ConfigMethods(KnownToTransformers):
    """What a Transformers configuration answers beside its values; `Config` inherits it."""

    _their_class = ("transformers.configuration_utils", "PretrainedConfig")

    # Constants of models without text, adapters of layers, or plans for several devices.
    base_config_key: ClassVar[str] = ""
    base_model_ep_plan: ClassVar[None] = None
    base_model_pp_plan: ClassVar[None] = None
    base_model_tp_plan: ClassVar[None] = None
    chunk_size_feed_forward: int = 0
    extra_config_files: ClassVar[tuple[str, ...]] = ()
    extra_files: ClassVar[tuple[str, ...]] = ()
    is_encoder_decoder: bool = False
    is_heterogeneous: ClassVar[bool] = False
    problem_type: str | None = None
    sub_configs: ClassVar[Mapping[str, type]] = {}
    transformers_version: ClassVar[None] = None

    # Other names of attributes: {other name: name}.
    attribute_map: ClassVar[Mapping[str, str]] = {}

    if not TYPE_CHECKING:  # a type checker would accept every name

        def __getattr__(self, name: str) -> Any:
            attribute = type(self).attribute_map.get(name)
            if attribute is not None:
                return getattr(self, attribute)
            raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "__class__" and callable(getattr(type(self), name, None)):
            raise AttributeError(f"{name!r} is a method of {type(self).__name__}, and no value")
        name = type(self).attribute_map.get(name, name)
        super().__setattr__(name, plain(value) if name in BOUNDS else value)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the values: `"hidden_size" in config` asks for one."""
        yield from self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return all values, in types that JSON supports."""
        raise NotImplementedError

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the text of config.json."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ValueError if a value is not valid."""
        raise NotImplementedError

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Set attributes. A refused value leaves the configuration as it was.

        Args:
            config_dict: the attributes, known or new, such as the result of `to_dict`.

        Raises:
            ValueError: a value is not valid.
        """
        changed = copy.deepcopy(self)
        for name, value in config_dict.items():
            if name != "model_type":  # a constant of the class, which `to_dict` also gives
                setattr(changed, name, value)
        self.__dict__.update(changed.__dict__)

    def update_from_string(self, update_str: str) -> None:
        """Set attributes from a text such as "hidden_size=256,use_auxiliary_head=false".

        Raises:
            ValueError: there is no such attribute, or the text is not a value of its type.
            TypeError: the attribute is no number, truth value or text.
        """
        changes = {}
        for part in update_str.split(","):
            name, equals, text = part.partition("=")
            if not equals or not hasattr(self, name):
                raise ValueError(f"{part!r} names no attribute of {type(self).__name__}; write name=value,name=value")
            changes[name] = _parsed(name, text, getattr(self, name))
        self.update(changes)

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write the text of `to_json_string` to a file."""
        with atomic_path(Path(json_file_path)) as path:
            path.write_text(self.to_json_string(use_diff), encoding="utf-8")

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """Return the configuration that `to_json_file` wrote.

        Raises:
            OSError: the file cannot be read, or is not valid JSON; the message names the file.
            ValueError: a value is not valid.
        """
        return cls(**read_json(Path(json_file)))

    def validate(self) -> None:
        """Check the values again, also those that were assigned after the configuration was built.

        Raises:
            ValueError: a value is not valid.
        """
        self.check()

    validate_architecture = validate

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return the configuration itself: there is no text model in it."""
        return self

    @classmethod
    def is_remote_code(cls) -> bool:
        """Return False: the class is not from the Hub."""
        return False

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return True: the class is not Transformers'."""
        return True

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload config.json to a Hub repository; it is made if it is missing.

        Args:
            repo_id: "name" or "organization/name".
            commit_message: of the commit.
            private: whether a new repository is private; the account's default if None.
            token: the token; True or None for the token that `hf auth login` stored.
            revision: the branch; made if it is missing.
            create_pr: open a pull request instead of committing.

        Returns:
            The commit's URL.

        Raises:
            OSError: the Hub refused the request.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.to_json_file(Path(folder) / CONFIG_NAME, use_diff=False)
            return upload(
                Path(folder),
                [CONFIG_NAME],
                repo_id,
                commit_message=commit_message or "Upload config",
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )


def _parsed(name: str, text: str, old: Any) -> Any:
    """Return a text as a value of the type of the attribute's old value."""
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        truths = {"true": True, "1": True, "y": True, "yes": True, "false": False, "0": False, "n": False, "no": False}
        if text.lower() not in truths:
            raise ValueError(f"{name}={text!r} is neither true nor false")
        return truths[text.lower()]
    if not isinstance(old, int | float):
        raise TypeError(f"{name} is {old!r}: only numbers, truth values and texts can be set by a text")
    try:
        return type(old)(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is no {type(old).__name__}") from None
