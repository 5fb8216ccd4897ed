"""Options that dataclass fields declare: their checks, their help, and the values that reach the dataclass."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args

import pytest
import typer
from typer.testing import CliRunner, Result

from fastuper.cli import app
from fastuper.cli.common import LayoutName
from fastuper.cli.options import expand_dataclasses, field_option
from fastuper.data.folders import Layout
from fastuper.io.options import check_options, document_options, option, options_of
from fastuper.recipes.recipes import RECIPES
from fastuper.training.config import TrainingConfig


@document_options
@dataclass(frozen=True)
class Oven:
    """How to bake."""

    minutes: int = option(40, "Baking time.", at_least=1, metavar="N")
    heat: float | None = option(
        None, "Heat.", more_than=0, at_most=300, default_text="the recipe's", metavar="C", flag="--degrees"
    )
    mode: Literal["fan", "grill"] = option("fan", "Source of the heat.")
    steam: bool = option(False, "Bake with steam.")
    shelf: int = option(2, "Shelf from below.", at_least=0, python_only=True)
    note: str = ""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Mixer:
    """How to knead, of which the command below takes the speed alone."""

    speed: int = option(3, "Speed.", at_least=1, metavar="N")
    hook: bool = option(False, "Knead with the hook.")


def bake(*arguments: str) -> Result:
    """Run a command that has all options of an oven, and an option of a mixer."""
    program = typer.Typer(rich_markup_mode=None)

    @program.command()
    @expand_dataclasses
    def command(
        *,
        loaf: Annotated[str, typer.Argument()],
        oven: Oven,
        speed: Annotated[int, field_option(Mixer, "speed")] = Mixer.speed,
        quiet: Annotated[bool, typer.Option("--quiet")] = False,
    ) -> None:
        """Bake."""
        typer.echo(f"{loaf} {oven} {speed} {quiet}")

    return CliRunner().invoke(program, list(arguments))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"minutes": 0}, "minutes must be a whole number of at least 1, got 0"),
        ({"minutes": 1.5}, r"minutes must be a whole number of at least 1, got 1\.5"),
        ({"minutes": "7"}, "minutes must be a whole number of at least 1, got '7'"),
        ({"heat": 0.0}, r"heat must be more than 0 and at most 300, got 0\.0"),
        ({"heat": 301}, "heat must be more than 0 and at most 300, got 301"),
        ({"heat": math.nan}, "heat must be more than 0 and at most 300, got nan"),
        ({"mode": "sun"}, "mode='sun' is not known; known are fan, grill"),
        ({"shelf": -1}, "shelf must be a whole number of at least 0, got -1"),
    ],
)
def test_values_out_of_bounds_are_named(values, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Oven(**values)


def test_bounds_and_none_are_within():
    for values in ({"minutes": 1}, {"heat": 300}, {"heat": None}, {"mode": "grill"}, {"shelf": 0}):
        Oven(**values)


def test_docstring_lists_the_options():
    assert Oven.__doc__ is not None
    assert Oven.__doc__.startswith("How to bake.\n\nArgs:\n    minutes: Baking time.\n")
    assert "    heat: Heat. None means the recipe's.\n" in Oven.__doc__
    assert "    shelf: Shelf from below." in Oven.__doc__


def test_fields_become_options_and_reach_the_dataclass():
    with_defaults = bake("rye")
    assert with_defaults.exit_code == 0, with_defaults.output
    assert with_defaults.stdout == f"rye {Oven()} 3 False\n"
    result = bake("rye", "--degrees", "220.5", "--mode", "grill", "--steam", "--speed", "5", "--quiet")
    assert result.stdout == f"rye {Oven(heat=220.5, mode='grill', steam=True)} 5 True\n"


def test_help_has_text_default_and_bounds_of_each_field():
    text = " ".join(bake("--help").stdout.replace("\\[", "[").split())  # typer 0.20 escapes the brackets
    assert "Baking time. [default: 40; x>=1]" in text
    assert "--degrees C Heat. [default: (the recipe's)]" in text
    assert re.search(r"--mode .fan\|grill. Source of the heat\. \[default: fan\]", text)
    assert "--steam Bake with steam." in text
    assert "--speed N Speed. [default: 3; x>=1]" in text
    assert "hook" not in text
    assert "shelf" not in text.lower()
    assert "--note" not in text
    assert "--no-" not in text


def test_values_out_of_bounds_end_the_command_with_status_2():
    for arguments, message in (
        (("--minutes", "0"), "Invalid value for '--minutes'"),
        (("--mode", "sun"), "Invalid value for '--mode'"),
        (("--degrees", "301"), "fastuper: heat must be more than 0 and at most 300, got 301.0"),
    ):
        result = bake("rye", *arguments)
        assert result.exit_code == 2
        assert message in result.output
        assert "rye" not in result.output


def test_training_has_an_option_for_each_field():
    text = CliRunner().invoke(app, ["train", "--help"]).stdout
    described = options_of(TrainingConfig)
    assert list(described) == [field.name for field in fields(TrainingConfig)]
    for name, option_of_field in described.items():
        flag = option_of_field.flag or f"--{name.replace('_', '-')}"
        assert (f"  {flag} " in text) is not option_of_field.python_only, name


def test_names_that_are_listed_twice_agree():
    """Their homes import torch, for which help would have to wait."""
    text = options_of(TrainingConfig)["recipe"].help
    assert [name for name in RECIPES if name not in text] == []
    assert get_args(LayoutName) == get_args(Layout)
