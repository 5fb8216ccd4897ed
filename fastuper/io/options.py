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


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a number, inclusive except `more_than`; None sets no limit.

    Attributes:
        at_least: the smallest value.
        more_than: the limit that the value must exceed.
        at_most: the largest value.
    """

    at_least: float | None = None
    more_than: float | None = None
    at_most: float | None = None

    def allow(self, value: Any) -> bool:
        """Return True if a number is within the limits; NaN is not, nor infinity if `more_than` is set."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.more_than is None or self.more_than < value < math.inf)
        )

    def in_words(self) -> str:
        """Return the limits as text, such as "at least 1 and at most 64"."""
        limits = {"more than": self.more_than, "at least": self.at_least, "at most": self.at_most}
        return " and ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)


@dataclass(frozen=True)
class Option(Limits):
    """The description of a dataclass field that is an option, with the limits of its value.

    Attributes:
        help: the meaning of the value, in one sentence.
        default_text: the meaning of the default None.
        metavar: the name of the value in a command's help.
        flag: the option's name on the command line, with its dashes.
        python_only: True if commands do not have the option.
    """

    help: str
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
        if (whole and not isinstance(value, int)) or not described.allow(value):
            raise ValueError(
                f"{name} must be {'a whole number of ' if whole else ''}{described.in_words()}, got {value!r}"
            )
