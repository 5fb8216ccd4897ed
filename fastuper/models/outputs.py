"""The models' outputs: dataclasses that are also ordered dictionaries and tuples, like Transformers' outputs."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch

from fastuper_kernels.dispatch.modes import current_autocast
from fastuper_kernels.dispatch.torch_private import MappingKey, register_pytree

Output = TypeVar("Output", bound="ModelOutput")


class Deferred:
    """A value that is computed at its first use, under the grad and autocast modes active when it was created.

    Args:
        compute: returns the value.
        device: the type of the device that it computes on.
    """

    def __init__(self, compute: Callable[[], Any], device: str):
        self.compute = compute
        self.with_gradients, self.in_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.autocast = current_autocast(device)

    def __call__(self) -> Any:
        """Compute and return the value."""
        with torch.inference_mode(self.in_inference), torch.set_grad_enabled(self.with_gradients), self.autocast:
            return self.compute()


class DeferrableField:
    """A dataclass field, None by default, that may hold a `Deferred`; reading the field computes the value."""

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.name = name

    def __get__(self, output: Any, owner: type[Any]) -> Any:
        if output is None:  # `dataclass` reads the field's default from the class
            return None
        value = output.__dict__.get(self.name)
        if isinstance(value, Deferred):
            value = value()
            setattr(output, self.name, value)
        return value

    def __set__(self, output: Any, value: Any) -> None:
        output.__dict__[self.name] = value


class ModelOutput(OrderedDict[str, Any]):
    """Base of the outputs: fields that are None are left out of the keys and of the tuple.

    `output.logits`, `output["logits"]` and `output[0]` are the same object. Subclasses are dataclasses. They are
    registered as pytrees, so that DistributedDataParallel, `torch.export` and `torch.compile` find their tensors. A
    `Deferred` value counts among the keys and in the length. Reading it by name or by index computes it. A loop over
    values or items, a conversion to a tuple, pickling and flattening compute all values.

    A subclass takes one argument, `class Output(ModelOutput, serialized_name="fastuper.Output")`: the name of its
    pytree in exported programs. It stays the same wherever the class lies; by default it is the class's full name.
    """

    serialized_name: ClassVar[str]
    # The class as this library defines it; `known_to_transformers` derives another class from it.
    _base: ClassVar[type[ModelOutput]]

    def __init_subclass__(cls, serialized_name: str | None = None) -> None:
        """Register the subclass as a pytree."""
        if "_base" not in cls.__dict__:
            cls._base = cls
        cls.serialized_name = serialized_name or f"{cls.__module__}.{cls.__qualname__}"
        register_pytree(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, keys: _rebuild(cls, zip(keys, values, strict=True)),
            lambda output: ([(MappingKey(key), value) for key, value in output.items()], list(output.keys())),
            name=cls.serialized_name,
        )

    def __post_init__(self) -> None:
        given = {field.name: self.__dict__.get(field.name) for field in fields(self)}  # type: ignore[arg-type]
        first = next(iter(given))
        # accelerate and DataParallel rebuild outputs by `type(output)(mapping)` and `type(output)(pairs)`.
        value = given[first]
        alone = all(other is None for name, other in given.items() if name != first)
        pairs = _as_pairs(value) if alone else None
        if pairs is not None:
            if unknown := pairs.keys() - given.keys():
                names, known = ", ".join(sorted(unknown)), ", ".join(given)
                raise TypeError(f"{type(self).__name__} has no field {names}; its fields are {known}")
            given = {name: pairs.get(name) for name in given}
        for name, value in given.items():
            setattr(self, name, value)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            names = list(self)[key]
            return self[names] if isinstance(names, str) else tuple(self[name] for name in names)
        value = OrderedDict.__getitem__(self, key)
        return getattr(self, key) if isinstance(value, Deferred) else value

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value at a key, or the default."""
        return self[key] if key in self else default  # noqa: SIM401 (`self.get` would call itself)

    def values(self) -> Any:
        """Compute all values and return them."""
        self._compute()
        return super().values()

    def items(self) -> Any:
        """Compute all values and return the (key, value) pairs."""
        self._compute()
        return super().items()

    def _compute(self) -> None:
        for key in self:
            self[key]

    def __setitem__(self, key: str, value: Any) -> None:
        # Transformers' pipelines add a key of their own ("target_size") and read it as a key.
        if key not in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            OrderedDict.__setitem__(self, key, value)
        setattr(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            if value is not None:
                OrderedDict.__setitem__(self, name, value)
            elif name in self:
                OrderedDict.__delitem__(self, name)
        object.__setattr__(self, name, value)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{type(self).__name__} cannot delete {key}; set {key} to None")

    def pop(self, *_: Any, **__: Any) -> Any:
        """Raise TypeError: an output keeps its fields."""
        raise TypeError(f"{type(self).__name__} has no pop or popitem; read its attributes")

    popitem = pop

    def setdefault(self, *_: Any, **__: Any) -> Any:
        """Raise TypeError: an output keeps its fields."""
        raise TypeError(f"{type(self).__name__} has no setdefault; set its attributes")

    def update(self, *_: Any, **__: Any) -> None:
        """Raise TypeError: an output keeps its fields."""
        raise TypeError(f"{type(self).__name__} has no update; set its attributes")

    def __reduce__(self) -> tuple[Any, ...]:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        added = [(key, value) for key, value in self.items() if key not in names]
        values = tuple(getattr(self, name) for name in names)
        # Another process cannot import a derived class by name, and derives it again.
        made = (type(self), values) if type(self) is self._base else (_new_derived, (self._base, values))
        return *made, None, None, iter(added)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not None, in the order of the keys; a field that was set later comes last."""
        return tuple(self.values())


def known_to_transformers(cls: type[Output]) -> type[Output]:
    """Return an output class itself or, once Transformers is imported, a subclass of it and of Transformers' output.

    The subclass inherits Transformers' class of the same name, or else its `ModelOutput`. Transformers' pipelines copy
    any other mapping into a dictionary, and then read attributes of that dictionary.
    """
    if torch.compiler.is_compiling():
        return cls
    theirs = getattr(sys.modules.get("transformers.utils.generic"), "ModelOutput", None)
    theirs = getattr(sys.modules.get("transformers.modeling_outputs"), cls.__name__, theirs)
    return cls if theirs is None else _derived(cls, theirs)


@cache
def _derived(cls: type[Any], theirs: type[Any]) -> type[Any]:
    names = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_base": cls}
    serialized = f"{cls.serialized_name}.transformers"
    return type(cls.__name__, (cls, theirs), names, serialized_name=serialized)


def _new_derived(cls: type[Any], values: tuple[Any, ...]) -> Any:
    return known_to_transformers(cls)(*values)


def _as_pairs(value: Any) -> dict[str, Any] | None:
    """Return a mapping or (key, value) pairs as a dictionary; None for anything else, such as a list of tensors."""
    if isinstance(value, Iterator):
        value = list(value)
    if isinstance(value, list) and not all(isinstance(item, tuple | list) and len(item) == 2 for item in value):
        return None
    return dict(value) if isinstance(value, Mapping | list) else None


def _rebuild(cls: type[Any], pairs: Iterable[tuple[str, Any]]) -> Any:
    output = cls()
    for key, value in pairs:
        output[key] = value
    return output


@dataclass(eq=False)
class EncoderOutput(ModelOutput, serialized_name="fastuper.EncoderOutput"):
    """The output of a backbone's encoder, which hooks on the encoder read.

    Attributes:
        last_hidden_state: the last stage's map, (B, C, H, W).
        hidden_states: the maps of the stem and of every stage, each (B, C, H, W), with `output_hidden_states`.
        attentions: see `BackboneOutput`.
    """

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(eq=False)
class BackboneOutput(ModelOutput, serialized_name="fastuper.BackboneOutput"):
    """The output of a backbone.

    Attributes:
        feature_maps: the maps of `out_features`, finest first, each (B, C, H, W).
        hidden_states: the maps of the stem and of every stage, each (B, C, H, W), with `output_hidden_states`.
        attentions: the attention weights of the last block of every stage, each (B * windows, heads, L, L) with L the
            number of positions in a window; with `output_attentions`, and only if the backbone has attention.
    """

    feature_maps: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(eq=False)
class SemanticSegmenterOutput(ModelOutput, serialized_name="fastuper.SemanticSegmenterOutput"):
    """The output of `UperNetForSemanticSegmentation`.

    Attributes:
        loss: scalar, if labels were given.
        logits: (B, num_labels, H, W), contiguous, at the size of `pixel_values`. With labels they are computed when
            they are first read.
        hidden_states: see `BackboneOutput`.
        attentions: see `BackboneOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = DeferrableField()  # type: ignore[assignment]
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(eq=False)
class ParsingOutput(ModelOutput, serialized_name="fastuper.ParsingOutput"):
    """The output of `UperNetForUnifiedPerceptualParsing`; what was not asked for is None.

    Attributes:
        loss: scalar, if labels were given: the weighted sum of the tasks' losses.
        scene: logits (B, classes).
        object: logits (B, classes, H, W) at the size of the first feature map.
        part: logits (B, channels, H, W) of the parts of all objects; `config.part_slices` has the channels of each.
        material: logits (B, classes, H, W).
        texture: logits (B, classes, H, W).
        scene_loss: scalar, without its weight, if the task has labels.
        object_loss: as `scene_loss`.
        part_loss: as `scene_loss`.
        material_loss: as `scene_loss`.
        texture_loss: as `scene_loss`.
        hidden_states: see `BackboneOutput`.
        attentions: see `BackboneOutput`.
    """

    loss: torch.Tensor | None = None
    scene: torch.Tensor | None = None
    object: torch.Tensor | None = None
    part: torch.Tensor | None = None
    material: torch.Tensor | None = None
    texture: torch.Tensor | None = None
    scene_loss: torch.Tensor | None = None
    object_loss: torch.Tensor | None = None
    part_loss: torch.Tensor | None = None
    material_loss: torch.Tensor | None = None
    texture_loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True, eq=False)
class Parsing:
    """The parsing of one image; a task that was not asked for is None.

    Attributes:
        scene: (scene, probability), the most probable first.
        objects: (H, W), the object of each pixel.
        parts: (H, W), the part of each pixel; 0 where the object has no parts, and for its other parts.
        materials: (H, W), the material of each pixel.
        textures: (H, W), the texture of each pixel.
    """

    scene: list[tuple[int, float]] | None = None
    objects: torch.Tensor | None = None
    parts: torch.Tensor | None = None
    materials: torch.Tensor | None = None
    textures: torch.Tensor | None = None
