"""`accelerate` makes another library's UPerNet faster in place; `restore` undoes it, `explain` shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import chain
from types import MethodType
from typing import Any

from torch import nn

from fastuper.models.heads.conv_module import FusedConv
from fastuper.models.heads.pooling import BranchParts, PooledCells
from fastuper.models.heads.pyramid import PyramidSteps
from fastuper.models.pyramid_model import PyramidModel
from fastuper.models.untouched import HOOKED, touched_by
from fastuper.patch.accelerated import MODELS, REPLACEMENTS, Accelerated, KnownModel, why_touched_inside

FILES = {
    "transformers.models.convnext": "fastuper.patch.convnext",
    "transformers.models.resnet": "fastuper.patch.resnet",
    "transformers.models.swin": "fastuper.patch.swin",
    "transformers.models.upernet": "fastuper.patch.transformers",
    "transformers.models.beit": "fastuper.patch.beit",
    "transformers.models.data2vec": "fastuper.patch.data2vec",
    "segmentation_models_pytorch.decoders.upernet": "fastuper.patch.smp",
    "mmseg.models": "fastuper.patch.mmseg",
    "timm.models.convnext": "fastuper.patch.timm",
}
"""The file of this folder that replaces the classes of a package; it is imported when a model has such a class."""

WIDTH = 140
"""Characters of a line of the table of `explain`, where it is not written to a terminal."""

KNOWN = (
    "Transformers' UperNetForSemanticSegmentation, BeitForSemanticSegmentation and "
    "Data2VecVisionForSemanticSegmentation, segmentation_models_pytorch's UPerNet, mmsegmentation's EncoderDecoder "
    "with UPerHead"
)


def accelerate(model: nn.Module) -> nn.Module:
    """Make another library's UPerNet faster, in place: the same object, arguments, results, parameters and names.

    Only the `forward` of its modules changes. Evaluation and training use less arithmetic and memory. A hooked,
    replaced or quantised module is called as before. Optimizers, DistributedDataParallel, Trainers and pipelines that
    hold the model keep working.

    Args:
        model: one of these models, or a module that holds some (DistributedDataParallel, PEFT, `nn.Sequential`):
            Transformers' `UperNetForSemanticSegmentation` over any backbone, `BeitForSemanticSegmentation` and
            `Data2VecVisionForSemanticSegmentation`; segmentation_models_pytorch's `UPerNet`; mmsegmentation's
            `EncoderDecoder` with `UPerHead`.

    Returns:
        The model itself. `fastuper.restore(model)` undoes the change, `fastuper.explain(model)` shows its parts.

    Raises:
        TypeError: `model` is no module.
        ValueError: it holds no model that `accelerate` knows, or a model whose head was replaced; or it is accelerated
            already, as a whole or in part. Nothing has changed.
    """
    found = _known_models(model)
    if not found:
        if any(isinstance(part, PyramidModel) for part in model.modules()):
            raise ValueError(f"{type(model).__name__} is a model of fastuper, which needs no acceleration")
        raise ValueError(f"{type(model).__name__} is no model that accelerate knows, and holds none; known are {KNOWN}")
    faults = [f"{known.words}: {fault}" for part, known in found if (fault := known.fault(part))]
    if faults:
        raise ValueError(f"the model is not whole, and nothing was changed: {faults[0]}; known are {KNOWN}")
    parts = list(dict.fromkeys(part for whole, _ in found for part in whole.modules()))
    done = sum(isinstance(part, Accelerated) for part in parts)
    if done:
        whole = not any(type(part) in REPLACEMENTS for part in parts)
        extent = "is accelerated already" if whole else "is accelerated in part"
        raise ValueError(f"{type(model).__name__} {extent}; call fastuper.restore(model) first")
    changed: list[nn.Module] = []
    try:
        for part in parts:
            if type(part) in REPLACEMENTS:
                _set_class(part, REPLACEMENTS[type(part)])
                changed.append(part)
    except TypeError:
        _restore(changed)
        raise
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: give each accelerated module its own class again.

    Args:
        model: an accelerated model, a copy of one, or a module that holds some.

    Returns:
        The model itself.

    Raises:
        TypeError: `model` is no module.
        ValueError: no part of it is accelerated; or something has changed the class of an accelerated part since. The
            model has not changed.
    """
    _check_module(model)
    accelerated = {name: part for name, part in model.named_modules() if isinstance(part, Accelerated)}
    if not accelerated:
        raise ValueError(f"no part of {type(model).__name__} is accelerated")
    for name, part in accelerated.items():
        if type(part) is not REPLACEMENTS[part.replaces]:  # a parametrization or FSDP makes a subclass
            raise ValueError(
                f"the class of {name or 'the model'} has changed to {type(part).__name__} since accelerate, and "
                "nothing was restored: remove its parametrizations or FSDP first"
            )
    _restore(list(accelerated.values()))
    return model


def explain(model: nn.Module) -> None:
    """Print a table of a model's parts: which are accelerated, which are not, and why.

    Args:
        model: a model that `accelerate` knows, accelerated or not; a model of fastuper; or a module that holds some.

    Raises:
        TypeError: `model` is no module.
        ValueError: it holds no such model.
    """
    from rich.console import Console
    from rich.table import Table

    rows = list(_rows(model))
    if not rows:
        raise ValueError(f"{type(model).__name__} holds no model that explain knows; known are {KNOWN}, and fastuper's")
    table = Table(title=type(model).__name__, title_justify="left")
    for column in ("part", "class", "state", "why"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    console.print(table)


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")


def _known_models(model: nn.Module) -> list[tuple[nn.Module, KnownModel]]:
    """Return the known models in a module, itself included."""
    _check_module(model)
    kinds = {base for part in model.modules() for base in type(part).__mro__}  # a user's subclass is known by its base
    for package, file in FILES.items():
        if any(f"{kind.__module__}.".startswith(f"{package}.") for kind in kinds):
            import_module(file)
    return [(part, known) for part in model.modules() for known in MODELS if isinstance(part, known.kind)]


def _rows(model: nn.Module) -> Iterator[tuple[str, str, str, str]]:
    """Yield the rows of `explain`: parts with the same place but for numbers, and in the same state, share a row."""
    wholes = [part for part, _ in _known_models(model)]
    wholes += [part for part in model.modules() if isinstance(part, PyramidModel)]
    groups: dict[tuple[str, ...], list[str]] = {}
    for path, whole in model.named_modules():
        if whole not in wholes:
            continue
        replaced = [module for part in whole.modules() for module in _steps(part) if _state(module) is None]
        for name, part in whole.named_modules(prefix=path):
            if (state := _state(part)) is not None:
                groups.setdefault((re.sub(r"\b\d+\b", "*", name), type(part).__name__, *state), []).append(name)
            elif part in replaced:
                groups[name, type(part).__name__, "called as it is", "it was put in another's place"] = [name]
        for name, child in whole.named_children():
            if all(_state(part) is None for part in child.modules()) and any(True for _ in child.parameters()):
                name = f"{path}.{name}".lstrip(".")
                groups[name, type(child).__name__, "as it is", "fastuper has no faster way for it"] = [name]
    for (_, kind, state_of, why), names in groups.items():
        yield _place(names), kind, state_of, why


def _steps(head: nn.Module) -> list[Any]:
    """Return the modules that an accelerated head calls, its classifier excluded; none for other modules."""
    if not (isinstance(head, Accelerated) and isinstance(head, PyramidSteps)):
        return []
    single = (getattr(head, name, None) for name in ("psp_modules", "bottleneck", "fpn_bottleneck"))
    lists = (getattr(head, name, ()) for name in ("lateral_convs", "fpn_convs"))  # smp's decoder has none of these
    steps = [*single, *chain.from_iterable(lists)]
    return [step for step in steps if isinstance(step, nn.Module)]


def _place(names: Sequence[str]) -> str:
    """Return the place of modules whose names differ in numbers alone: `*` for numbers that differ, and their count."""
    parts = [set(values) for values in zip(*(name.split(".") for name in names), strict=True)]
    place = ".".join(min(values) if len(values) == 1 else "*" for values in parts) or "the model"
    return place if len(names) == 1 else f"{place} ({len(names)})"


def _state(part: nn.Module) -> tuple[str, str] | None:
    """Return the state of a part of a model, and the reason; None for a part that no row shows."""
    base = next((kind for kind in type(part).__mro__ if kind in REPLACEMENTS), None)
    if not getattr(REPLACEMENTS[base] if base else part, "is_shown", True):
        return None
    if isinstance(part, Accelerated):
        inside = part.why_not()
    elif base is not None:
        own = type(part) is base
        return "as it is", "call fastuper.accelerate(model)" if own else f"its class is a subclass of {base.__name__}"
    elif isinstance(part, FusedConv | PyramidSteps | PooledCells) or hasattr(type(part), "rewrite"):
        inside = why_touched_inside(part)
    else:
        return None
    why = touched_by(part)
    if why == HOOKED and not isinstance(part, FusedConv | PooledCells | BranchParts):
        return ("called as it is", inside) if inside else ("accelerated", "its hook is called too")
    why = why or inside
    return ("called as it is", why) if why else ("accelerated", "")


def _restore(parts: Sequence[nn.Module]) -> None:
    for part in parts:
        assert isinstance(part, Accelerated)
        _set_class(part, part.replaces)


def _set_class(part: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a module, and the `forward` of its old class where the instance holds it.

    Accelerate keeps this bound method on the instance, for a forward of its own that calls it.
    """
    before = type(part).forward
    part.__class__ = kind
    for name, value in part.__dict__.items():
        if isinstance(value, MethodType) and value.__func__ is before and value.__self__ is part:
            part.__dict__[name] = MethodType(kind.forward, part)
