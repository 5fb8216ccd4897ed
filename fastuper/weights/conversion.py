"""The vocabulary of conversions: a checkpoint as read, rules for its names, and the result with every tensor listed.

A dialect is a file beside this one: the table of names of one library's checkpoints. It turns a `Source` into a
`Conversion`. No model is built here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fastuper.io.messages import listed, shown
from fastuper.weights.config_text import Unread
from fastuper.weights.errors import CheckpointError
from fastuper.weights.options import OPTIONS, plain

Change = Callable[[torch.Tensor], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Source:
    """A checkpoint of another library, as it was read.

    Attributes:
        place: the file or folder; messages begin with it.
        tensors: tensors by their names in the file, without the "module." of a wrapper.
        settings: the checkpoint's own configuration as plain values: the text in the metadata of mmengine or mmcv
            (`model`, `test_pipeline`, ...), or the config.json of a folder. Empty if there is none.
        classes: the names of the classes in the metadata.
        palette: (red, green, blue) of each class in the metadata.
        notes: sentences about choices that were made, such as between two state dicts.
        left_out: rows of tensors that are none of the model's, such as a counter of averaged weights.
    """

    place: str
    tensors: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None
    notes: tuple[str, ...] = ()
    left_out: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Row:
    """What became of one tensor of a source.

    Attributes:
        source: its name in the file.
        targets: the names of the model's tensors that were made of it; none if it was left out.
        note: how its values were changed, or why it was left out; "" if it was copied.
    """

    source: str
    targets: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Rule:
    """What becomes of the tensors whose whole name a regular expression matches.

    Args:
        pattern: the regular expression; the full name must match.
        targets: templates of the names that are made of the tensor (`re.Match.expand`); none if it is left out.
        note: how `change` changes values, or why the tensor is left out.
        change: returns a tensor for each target; None to copy.
    """

    pattern: str
    targets: tuple[str, ...] = ()
    note: str = ""
    change: Change | None = None


@dataclass(frozen=True)
class Translated:
    """The result of `translate`: tensors by the model's names, and a row for each tensor of the source."""

    tensors: dict[str, torch.Tensor]
    rows: list[Row]


def translate(
    tensors: Mapping[str, torch.Tensor], rules: Sequence[Rule], place: str, prefix: str = "", target_prefix: str = ""
) -> Translated:
    """Apply the first rule that matches each name.

    Args:
        tensors: tensors by their names, without `prefix`.
        rules: the dialect's table.
        place: where the tensors come from, for messages.
        prefix: the beginning of the names in the file, for rows and messages.
        target_prefix: the beginning of the model's names.

    Raises:
        CheckpointError: no rule has a name, two tensors become one, or a change does not fit a tensor's shape.
    """
    made: dict[str, torch.Tensor] = {}
    rows: list[Row] = []
    unknown: list[str] = []
    for name, tensor in tensors.items():
        for rule in rules:
            if match := re.fullmatch(rule.pattern, name):
                break
        else:
            unknown.append(prefix + name)
            continue
        targets = tuple(target_prefix + match.expand(template) for template in rule.targets)
        try:
            values = (tensor,) * len(targets) if rule.change is None else tuple(rule.change(tensor))
        except (RuntimeError, ValueError, IndexError):
            raise CheckpointError(
                f"{place}: {prefix}{name} has shape {tuple(tensor.shape)}, which no such tensor can have"
            ) from None
        for target, value in zip(targets, values, strict=True):
            if target in made:
                raise CheckpointError(f"{place}: {prefix}{name} and another tensor are both {target}")
            made[target] = value
        rows.append(Row(prefix + name, targets, rule.note))
    if unknown:
        raise CheckpointError(
            f"{place} has {len(unknown)} tensors of another network, such as {listed(unknown, 2)}; it cannot be "
            "converted"
        )
    return Translated(made, rows)


class Choices:
    """What names and shapes do not decide: from the checkpoint's own settings, else an option, else a default.

    Args:
        given: the options that the caller gave, by their names in `OPTIONS`; None for an option that was not given.

    Attributes:
        notes: a sentence for each default and option that was used.

    Raises:
        ValueError: there is no such option, or a value is of another kind.
    """

    def __init__(self, given: Mapping[str, Any] | None = None):
        chosen = {name: value for name, value in (given or {}).items() if value is not None}
        if unknown := [name for name in chosen if name not in OPTIONS]:
            raise ValueError(f"a conversion has no option {listed(unknown)}; its options are {', '.join(OPTIONS)}")
        self._given = {name: OPTIONS[name].check(name, value) for name, value in chosen.items()}
        self._used: set[str] = set()
        self.notes: list[str] = []

    def settle(self, name: str, stored: Any, default: Any) -> Any:
        """Return the value of an option, and note where it comes from.

        Args:
            name: a name in `OPTIONS`.
            stored: the value that the checkpoint itself gives, by its settings or its shapes; None if it gives none.
            default: the value if nobody gives one. None if there is none: then a missing value is an error.

        Raises:
            ValueError: the caller's value contradicts the checkpoint's, or there is no value at all.
        """
        self._used.add(name)
        given = self._given.get(name)
        stored = plain(stored)
        if isinstance(stored, Unread):
            if given is None:
                raise ValueError(f"the checkpoint's {name} is {shown(stored.text)}, which is no literal; give {name}")
            stored = None
        if isinstance(stored, list) or (stored is None and isinstance(default, list | tuple)):
            given = [given] if isinstance(given, int | float) else given
        if stored is not None:
            if given is not None and given != stored:
                raise ValueError(
                    f"{name}={shown(given)} contradicts the checkpoint, which has {shown(stored)}; leave it out"
                )
            return stored
        if given is not None:
            self.notes.append(f"{name}: {_text(given)} (as given)")
            return given
        if default is None:
            raise ValueError(f"the checkpoint does not say its {OPTIONS[name].text}; give {name}")
        self.notes.append(f"{name}: {_text(plain(default))} (the default; the checkpoint does not say)")
        return plain(default)

    def has(self, name: str) -> bool:
        """Return True if the caller gave an option."""
        return name in self._given

    def unused(self) -> list[str]:
        """Return the options that were given and that the dialect never asked for."""
        return [name for name in self._given if name not in self._used]


def _text(value: Any) -> str:
    parts = value if isinstance(value, list) else [value]
    return ", ".join(f"{part:.6g}" if isinstance(part, float) else str(part) for part in parts)


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint.

    Attributes:
        dialect: the library and the network, in words: "mmsegmentation's UPerHead over Swin".
        kind: the `model_type` of a whole model's configuration; "backbone" for a backbone alone (a classifier's).
        config: for a UPerNet the values of `UperNetConfig`, `backbone_config` among them with its `model_type`; for a
            backbone the values of its configuration, with `model_type`.
        tensors: tensors by the names of our model, or of our backbone module.
        rows: a row for each tensor of the source.
        preprocessing: values of preprocessor_config.json that the source gives.
        notes: sentences about choices, defaults and what is left out.
        initialised: beginnings of the names of tensors that the source cannot have, and that get initial values.
        only_fastuper: why Transformers cannot load the result; "" if it can.
        library: the `Dialect.library` by which it was converted.
    """

    dialect: str
    kind: Literal["upernet", "backbone", "unified_perceptual_parsing"]
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    rows: Sequence[Row]
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    initialised: tuple[str, ...] = ()
    only_fastuper: str = ""
    library: str = ""


@dataclass(frozen=True)
class Dialect:
    """A kind of checkpoint that can be converted.

    Attributes:
        name: in messages that list the kinds.
        recognises: whether a source is of this kind, by names, shapes and settings.
        convert: returns the conversion.
        library: "mmseg", "smp" or "timm", if the package of this name can run the checkpoint; else "".
    """

    name: str
    recognises: Callable[[Source], bool]
    convert: Callable[[Source, Choices], Conversion]
    library: str = ""
