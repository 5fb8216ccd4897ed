"""Options as dataclass fields: the field declares its help, its bounds and its name on the command line.

`fastuper.cli.options` makes command line options of such fields; `check_options` checks their values. This file imports
nothing that costs time, so that `fastuper --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class Option:
    """The description of a dataclass field that is an option.

    Attributes:
        help: the meaning of the value, in one sentence.
        at_least: the smallest value; None sets no limit.
        more_than: the limit that the value must exceed; None sets no limit.
        at_most: the largest value; None sets no limit.
        default_text: the meaning of the default None.
        metavar: the name of the value in a command's help.
        flag: the option's name on the command line, with its dashes.
        python_only: True if commands do not have the option.
    """

    help: str
    at_least: float | None = None
    more_than: float | None = None
    at_most: float | None = None
    default_text: str | None = None
    metavar: str | None = None
    flag: str | None = None
    python_only: bool = False


def option(default: Any, help: str, **description: Any) -> Any:
    """Return a dataclass field with a default and the `Option` of the other arguments."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **description)})


def options_of(kind: type) -> dict[str, Option]:
    """Return the options of a dataclass by the names of its fields; fields without an option are left out."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(kind) if "option" in field.metadata}


def document_options(kind: Class) -> Class:
    """Add an `Args:` section with the options of a dataclass to its docstring; a decorator."""
    lines = [
        f"    {name}: {described.help}" + (f" None means {described.default_text}." if described.default_text else "")
        for name, described in options_of(kind).items()
    ]
    kind.__doc__ = "\n".join([inspect.cleandoc(kind.__doc__ or ""), "", "Args:", *lines])
    return kind


def check_options(values: Any) -> None:
    """Check the values of a dataclass against the bounds of its options. None is within all bounds.

    Raises:
        ValueError: a value is out of its bounds, or not among the field's `Literal` values; the message names the field
            and the bounds.
    """
    hints = get_type_hints(type(values))
    for name, described in options_of(type(values)).items():
        value = getattr(values, name)
        if value is None:
            continue
        kind = hints[name]
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{name}={value!r} is not known; known are {', '.join(map(str, get_args(kind)))}")
        whole = int in (kind, *get_args(kind))
        if (whole and not isinstance(value, int)) or not _is_within(value, described):
            raise ValueError(
                f"{name} must be {'a whole number of ' if whole else ''}{_bounds(described)}, got {value!r}"
            )


def _is_within(value: Any, described: Option) -> bool:
    """Return True if a value is within an option's bounds; NaN is not, nor infinity if `more_than` is set."""
    return (
        (described.at_least is None or value >= described.at_least)
        and (described.more_than is None or (value > described.more_than and math.isfinite(value)))
        and (described.at_most is None or value <= described.at_most)
    )


def _bounds(described: Option) -> str:
    """Return the bounds of an option in words."""
    limits = {
        "more than": described.more_than,
        "at least": described.at_least,
        "at most": described.at_most,
    }
    return " and ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)
