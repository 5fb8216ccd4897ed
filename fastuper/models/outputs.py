"""What the model returns: dataclasses that are also ordered dictionaries and tuples, as Transformers' outputs are."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch.utils import _pytree as pytree

from fastuper_kernels.dispatch.modes import current_autocast

Output = TypeVar("Output", bound="ModelOutput")


class Deferred:
    """A value that is computed when somebody first looks at it.

    Args:
        compute: returns the value. It runs with gradients and autocast on or off as they are now, wherever it is
            called.
        device: the type of device that it computes on.
    """

    def __init__(self, compute: Callable[[], Any], device: str):
        self.compute = compute
        self.with_gradients, self.in_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.autocast = current_autocast(device)

    def __call__(self) -> Any:
        """Return the value."""
        with torch.inference_mode(self.in_inference), torch.set_grad_enabled(self.with_gradients), self.autocast:
            return self.compute()


class DeferrableField:
    """A dataclass field, None by default, that may hold a `Deferred`: whoever reads it gets the value itself."""

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.name = name

    def __get__(self, output: Any, owner: type[Any]) -> Any:
        if output is None:  # what `dataclass` takes for the field's default
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

    `output.logits`, `output["logits"]` and `output[0]` are the same object. Subclasses are dataclasses, and pytrees,
    so that DistributedDataParallel, `torch.export` and `torch.compile` see the tensors inside. A value that is
    `Deferred` is among the keys and in the length, and is computed when it is read by its name or its place, or with
    all the others: in a loop over values or items, as a tuple, pickled or flattened.
    """

    _plain: ClassVar[type[ModelOutput]]

    def __init_subclass__(cls) -> None:
        """Register the subclass as a pytree."""
        if "_plain" not in cls.__dict__:
            cls._plain = cls
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, keys: _rebuild(cls, zip(keys, values, strict=True)),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}" + (".derived" if cls._plain is not cls else ""),
            flatten_with_keys_fn=lambda output: (
                [(pytree.MappingKey(key), value) for key, value in output.items()],
                list(output.keys()),
            ),
        )

    def __post_init__(self) -> None:
        given = {field.name: self.__dict__.get(field.name) for field in fields(self)}  # type: ignore[arg-type]
        first = next(iter(given))
        # accelerate and DataParallel rebuild outputs as `type(output)(mapping)` and `type(output)(pairs)`.
        value = given[first]
        alone = all(other is None for name, other in given.items() if name != first)
        pairs = _as_pairs(value) if alone else None
        if pairs is not None:
            if unknown := pairs.keys() - given.keys():
                raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}; it has {', '.join(given)}")
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
        return self[key] if key in self else default  # noqa: SIM401 (it would be this method)

    def values(self) -> Any:
        """Return the values, all of them computed."""
        self._compute()
        return super().values()

    def items(self) -> Any:
        """Return keys and values, all of them computed."""
        self._compute()
        return super().items()

    def _compute(self) -> None:
        for key in self:
            self[key]

    def __setitem__(self, key: str, value: Any) -> None:
        # Transformers' pipelines add a key of their own ("target_size"): it has to be found again as a key.
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
        raise TypeError(f"nothing can be deleted from a {type(self).__name__}; set {key} to None")

    def pop(self, *_: Any, **__: Any) -> Any:
        """Refuse: an output keeps its fields."""
        raise TypeError(f"nothing can be popped from a {type(self).__name__}")

    popitem = pop

    def setdefault(self, *_: Any, **__: Any) -> Any:
        """Refuse: an output keeps its fields."""
        raise TypeError(f"a {type(self).__name__} has no setdefault")

    def update(self, *_: Any, **__: Any) -> None:
        """Refuse: an output keeps its fields."""
        raise TypeError(f"a {type(self).__name__} cannot be updated; set its attributes")

    def __reduce__(self) -> tuple[Any, ...]:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        added = [(key, value) for key, value in self.items() if key not in names]
        values = tuple(getattr(self, name) for name in names)
        # A derived class has no name that another process could import; it is derived anew there.
        made = (type(self), values) if type(self) is self._plain else (_derived_with, (self._plain, values))
        return *made, None, None, iter(added)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not None, in the order of the keys: the fields' own, unless one was set later."""
        return tuple(self.values())


def known_to_transformers(cls: type[Output]) -> type[Output]:
    """Return an output class as it is, or, once Transformers is imported, a subclass that is one of its outputs too.

    Its pipelines make a plain dictionary of any other mapping, in which they then look for attributes.
    """
    if torch.compiler.is_compiling():
        return cls
    theirs = getattr(sys.modules.get("transformers.utils.generic"), "ModelOutput", None)
    return cls if theirs is None else _derived(cls, theirs)


@cache
def _derived(cls: type[Any], theirs: type[Any]) -> type[Any]:
    return type(cls.__name__, (cls, theirs), {"__module__": cls.__module__, "__doc__": cls.__doc__, "_plain": cls})


def _derived_with(cls: type[Any], values: tuple[Any, ...]) -> Any:
    return known_to_transformers(cls)(*values)


def _as_pairs(value: Any) -> dict[str, Any] | None:
    """Return what a mapping or (key, value) pairs hold; None for anything else, such as a list of tensors."""
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
class BackboneOutput(ModelOutput):
    """What a backbone returns.

    Attributes:
        feature_maps: the maps of `out_features`, finest first, each (B, C, H, W).
        hidden_states: the maps of the stem and of every stage, each (B, C, H, W), where they were asked for.
        attentions: the attention weights of the last block of every stage, each (B * windows, heads, L, L) with L the
            number of positions in a window, where they were asked for and the backbone has attention.
    """

    feature_maps: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(eq=False)
class SemanticSegmenterOutput(ModelOutput):
    """What `UperNetForSemanticSegmentation` returns.

    Attributes:
        loss: scalar, where labels were given.
        logits: (B, num_labels, H, W), contiguous, at the size of `pixel_values`. With labels they are computed when
            they are first read.
        hidden_states: see `BackboneOutput`.
        attentions: see `BackboneOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = DeferrableField()  # type: ignore[assignment]
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
