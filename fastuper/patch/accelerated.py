"""`Accelerated`, the base of the classes that replace another library's, and the tables of these classes.

A module is accelerated by a change of its class, to a subclass of its own class with another `forward`. The object,
its parameters, its children and their names stay. The subclass has the name of the class that it replaces:
`save_pretrained` writes this name, and pipelines read it. It is defined in a file of this folder, so that an
accelerated module can be pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from fastuper.models.heads.conv_module import FusedConv
from fastuper.models.untouched import touched_by

REPLACEMENTS: dict[type[nn.Module], type[Accelerated]] = {}
"""The accelerated class for each class of another library."""


class Accelerated(nn.Module):
    """Base of the accelerated classes; a subclass inherits the class that it replaces too.

    `class Head(Accelerated, OurSteps, theirs.Head, replaces=theirs.Head)` enters itself into `REPLACEMENTS`.
    """

    replaces: ClassVar[type[nn.Module]]
    is_shown: ClassVar[bool] = True
    """False for a part of a block that has no faster way of its own: `explain` shows no row of it."""

    is_container: ClassVar[bool] = False
    """True for a module whose own steps are the same whatever is touched inside it."""

    if TYPE_CHECKING:  # the library's class has attributes of any type

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, replaces: type[nn.Module] | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if replaces is not None:
            cls.replaces = replaces
            REPLACEMENTS[replaces] = cls

    def why_not(self) -> str:
        """Return why the module runs as its library wrote it, in words; "" if it runs faster.

        Hooks on the module itself run in both cases.
        """
        return "" if self.is_container else why_touched_inside(self)


def why_touched_inside(block: nn.Module, called: Sequence[str] = ()) -> str:
    """Return the first touched module inside a block, and what touched it, in words; "" if there is none.

    A module inside that has a faster way of its own is left out, with its children.

    Args:
        block: the block.
        called: names of children that are left out: the block calls them, and needs no faster way for them.
    """
    pending = [(name, part) for name, part in block.named_children() if name not in called]
    while pending:
        name, part = pending.pop(0)
        if isinstance(part, FusedConv) or (isinstance(part, Accelerated) and part.is_shown):
            continue
        if why := touched_by(part):
            return f"{'module ' if name.isdigit() else ''}{name}: {why}"
        pending = [(f"{name}.{inner}", child) for inner, child in part.named_children()] + pending
    return ""


def why_another_class(block: nn.Module, kind: type[nn.Module], *names: str) -> str:
    """Return which of these modules inside a block, by their names, is of another class than `kind`, in words."""
    for name in names:
        part = block.get_submodule(name)
        if type(part) is not kind:
            return f"{name}: its class is {type(part).__name__}"
    return ""


def why_not_fusible(block: FusedConv) -> str:
    """Return why a block's convolution is called as a module, in words; "" if it is fused."""
    if block.is_fusible():
        return ""
    conv = block.conv
    return f"conv: {touched_by(conv) or f'no way for {conv}'}"


@dataclass(frozen=True)
class KnownModel:
    """A model of another library that `accelerate` knows.

    Args:
        words: its name, for messages: "Transformers' UperNetForSemanticSegmentation".
        kind: its class.
        head: the name of the child that is the head.
        head_kind: the head's class.
    """

    words: str
    kind: type[nn.Module]
    head: str
    head_kind: type[nn.Module]

    def fault(self, model: nn.Module) -> str:
        """Return what is wrong with a model of this class, in words; "" if `accelerate` can take it."""
        head = getattr(model, self.head, None)
        if isinstance(head, nn.Module) and any(isinstance(part, self.head_kind) for part in head.modules()):
            return ""
        return f"its {self.head} is a {type(head).__name__}, and holds no {self.head_kind.__name__}"


MODELS: list[KnownModel] = []
"""The known models of the libraries that were imported."""
