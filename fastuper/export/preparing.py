"""The model for an export: loaded, checked, copied, and put into evaluation mode once."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fastuper.data.processor import UperNetImageProcessor
from fastuper.export.settings import ExportError
from fastuper.inference.loading import LoadError, class_of, load
from fastuper.io.messages import name_of, one_line
from fastuper.models.pyramid_model import PyramidModel
from fastuper.models.untouched import is_replaced
from fastuper.models.upernet import UperNetForSemanticSegmentation
from fastuper_kernels.dispatch.torch_private import (
    PARAMETER_CLASSES,
    children_of,
    has_global_hooks,
    hooks_of,
    parameters_of,
)

LOADING = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)
"""The errors of a checkpoint that cannot be loaded."""

SAME = 1e-4
"""The largest error of Transformers' model as a model of fastuper, relative; rounding makes less."""


@dataclass(frozen=True)
class Prepared:
    """A model that can be exported.

    Attributes:
        model: in evaluation mode, float32, on the CPU, without gradients; nothing else holds it.
        processor: its image processor.
        notes: what was assumed, a sentence each.
    """

    model: PyramidModel
    processor: UperNetImageProcessor
    notes: tuple[str, ...]


def prepare(source: Any, processor: Any = None) -> Prepared:
    """Load or copy a model.

    Args:
        source: a model of fastuper, Transformers' UperNetForSemanticSegmentation, a folder, a Hub id, or a checkpoint
            of another library. A model may be in training mode, of any dtype and on any device; it does not change.
        processor: the image processor, of fastuper or of Transformers; if None, the checkpoint's.

    Raises:
        ExportError: the model cannot be loaded, is of another kind, or is hooked, adapted or quantised.
    """
    notes: list[str] = []
    if isinstance(source, nn.Module):
        model = _own_copy(source)
        name = type(source).__name__
    elif isinstance(source, str | os.PathLike):
        model, found = _loaded(os.fspath(source))
        processor = found if processor is None else processor
        name = name_of(source)
    else:
        raise ExportError(f"a model, a folder or a Hub id is exported, not {type(source).__name__}")
    if processor is None:
        notes.append(f"no image processor was given for {name}: photos are prepared with the default settings")
        processor = UperNetImageProcessor()
    return Prepared(model.requires_grad_(False), _own_processor(processor), tuple(notes))


def _loaded(source: str) -> tuple[PyramidModel, UperNetImageProcessor | None]:
    """Load a checkpoint in float32, and its image processor if it has one."""
    lacks: list[str] = []
    try:
        model, processor = load(class_of(source), source, torch.device("cpu"), "float32", lacks.append)
    except LoadError as error:
        raise ExportError(str(error)) from None
    return model, None if lacks else processor


def _own_copy(model: nn.Module) -> PyramidModel:
    """Return a model of fastuper with the weights of a model."""
    for name, part in model.named_modules():
        if (fault := _fault(part)) is not None:
            raise ExportError(f"{type(model).__name__} cannot be exported: {name or 'the model'}: {fault}")
    if has_global_hooks():
        raise ExportError("a hook is registered on all modules, and an export would leave it out; remove it")
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise ExportError(
            f"{type(model).__name__} has tensors on the device meta, which have no values; load its weights"
        )
    if isinstance(model, PyramidModel):
        try:
            return copy.deepcopy(model).to("cpu", torch.float32).eval()
        except (RuntimeError, TypeError) as error:
            raise ExportError(f"{type(model).__name__} cannot be copied: {one_line(error)}") from None
    if any(f"{kind.__module__}.".startswith("transformers.models.upernet.") for kind in type(model).__mro__):
        return _of_transformers(model)
    inside = [type(part).__name__ for part in model.modules() if isinstance(part, PyramidModel)]
    if inside:
        raise ExportError(f"{type(model).__name__} holds a {inside[0]}; export the model inside")
    raise ExportError(
        f"{type(model).__name__} is neither a UPerNet of fastuper nor of Transformers; save its checkpoint, and run "
        "`fastuper convert` on it"
    )


@torch.inference_mode()
def _of_transformers(model: Any) -> PyramidModel:
    """Return Transformers' UPerNet, accelerated or not, as a model of fastuper."""
    name = type(model).__name__
    try:
        with torch.inference_mode(False):
            own = UperNetForSemanticSegmentation.from_pretrained(
                None, config=model.config, state_dict=model.state_dict(), dtype=torch.float32, device="cpu"
            )
        theirs = copy.deepcopy(model).to("cpu", torch.float32).eval()
        images = torch.randn(1, getattr(model.config.backbone_config, "num_channels", 3), 96, 128)
        expected = theirs(images).logits
        error = float((own(images).logits - expected).norm() / expected.norm())
    except LOADING as fault:
        raise ExportError(f"{name} of Transformers cannot become a model of fastuper: {one_line(fault)}") from None
    if not error <= SAME:
        raise ExportError(
            f"{name} of Transformers is another function as a model of fastuper (relative difference {error:.1e}): a "
            "part of it was replaced; put the part into fastuper's model, and export that"
        )
    return own


def _own_processor(processor: Any) -> UperNetImageProcessor:
    """Return an image processor of fastuper or of Transformers as fastuper's."""
    if isinstance(processor, UperNetImageProcessor):
        return processor
    try:
        if isinstance(processor, str | os.PathLike):
            return UperNetImageProcessor.from_pretrained(processor)
        return UperNetImageProcessor.from_dict(processor.to_dict())
    except (AttributeError, *LOADING) as error:
        raise ExportError(f"processor: {one_line(error)}; give a UperNetImageProcessor") from None


def _fault(part: nn.Module) -> str | None:
    """Return why a module cannot be exported, and the remedy; None if it can be."""
    kind = type(part)
    package = kind.__module__.split(".")[0]
    if package == "peft":
        return f"it is a {kind.__name__} of peft; export what merge_and_unload() of the adapted model returns"
    if kind.__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel") and hasattr(
        part, "module"
    ):
        return f"it is wrapped in {kind.__name__}; export its .module"
    if kind.__name__ == "OptimizedModule":
        return "it is compiled; export the model that torch.compile was given (._orig_mod)"
    if ".quantized" in kind.__module__ or package in ("bitsandbytes", "torchao"):
        return f"it is quantised ({kind.__name__}); export the unquantised model, with int8=FOLDER if you like"
    if "parametrizations" in children_of(part):
        return "it has parametrizations; bake them in by torch.nn.utils.parametrize.remove_parametrizations"
    for hook in _hooks(part):
        return _about_hook(hook)
    if is_replaced(part):
        return (
            "its forward was replaced on the instance, and an export may leave that out; put the change into a "
            "subclass, or del module.forward (accelerate: remove_hook_from_submodules)"
        )
    for name, tensor in parameters_of(part).items():
        if tensor is not None and type(tensor) not in PARAMETER_CLASSES:
            kind_of = type(tensor).__name__
            return f"its {name} is of the class {kind_of}, quantised or sharded; export the whole float model"
    return None


def _hooks(part: nn.Module) -> Iterator[Any]:
    """Yield the hooks of a module, without those by which timm and Transformers collect the maps of a backbone."""
    for hook in (hook for table in hooks_of(part) for hook in table.values()):
        inner = hook.func if isinstance(hook, partial) else hook
        if str(getattr(inner, "__module__", "")).split(".")[0] not in ("timm", "transformers"):
            yield inner


def _about_hook(hook: Any) -> str:
    name = getattr(hook, "__qualname__", type(hook).__name__)
    module = str(getattr(hook, "__module__", ""))
    remedy = "remove it by its handle"
    if module == "torch.nn.utils.prune":
        remedy = "bake it in by torch.nn.utils.prune.remove(module, name)"
    elif module in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"):
        remedy = f"bake it in by torch.nn.utils.remove_{module.rpartition('.')[2]}(module)"
    return f"a hook is registered on it ({name}), and an export would leave it out; {remedy}"
