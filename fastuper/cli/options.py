"""Command line options, made from dataclass fields that `fastuper.io.options` describes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from fastuper.cli.common import folder, leave
from fastuper.io.messages import one_line
from fastuper.io.options import options_of


def expand_dataclasses(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of its dataclass parameters; a decorator.

    The command line fills the fields, and the command is called with the dataclass. A ValueError of the dataclass ends
    the command with its message and status 2.

    Args:
        command: a function for `typer.Typer.command`; a parameter that is annotated with a dataclass is replaced.

    Returns:
        A function with the other parameters, and one for each field that is an option.
    """
    signature = inspect.signature(command, eval_str=True)
    kinds: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if dataclasses.is_dataclass(parameter.annotation)
    }

    @wraps(command)
    def run(**values: Any) -> None:
        for parameter, kind in kinds.items():
            given = {name: values.pop(name) for name in _command_options(kind)}
            try:
                values[parameter] = kind(**given)
            except ValueError as error:
                leave(one_line(error))
        command(**values)

    parameters = []
    for name, parameter in signature.parameters.items():
        expanded = _field_parameters(kinds[name]) if name in kinds else [parameter]
        # Parameters are passed by keyword: options with defaults may then precede options without.
        parameters += [each.replace(kind=Parameter.KEYWORD_ONLY) for each in expanded]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def field_option(kind: type, name: str) -> Any:
    """Return the typer option of one field of a dataclass, for the parameter of a command."""
    described = options_of(kind)[name]
    flag = described.flag or "--" + name.replace("_", "-")  # explicit, so that a bool has no second flag --no-...
    inclusive = described.more_than is None  # typer has no exclusive bounds; the dataclass checks them
    return typer.Option(
        flag,
        help=described.help,
        parser=folder if Path in get_args(get_type_hints(kind)[name]) else None,
        metavar=described.metavar,
        min=described.at_least,
        max=described.at_most if inclusive else None,
        show_default=True if described.default_text is None else described.default_text,
    )


def _command_options(kind: type) -> list[str]:
    return [name for name, described in options_of(kind).items() if not described.python_only]


def _field_parameters(kind: type) -> list[Parameter]:
    """Return a parameter of a command for each field of a dataclass that is an option."""
    hints = get_type_hints(kind)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    return [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=defaults[name],
            annotation=Annotated[hints[name], field_option(kind, name)],
        )
        for name in _command_options(kind)
    ]
