"""`KnownToTransformers`: `isinstance` with a class of Transformers, without Transformers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")


class KnownToTransformers:
    """Makes `isinstance` with a class of Transformers true once Transformers is imported.

    Transformers' Trainer writes config.json beside the weights only for a `PreTrainedModel`; its Auto classes use a
    given configuration only if it is a `PretrainedConfig`. Nothing is inherited: `type(x)` is the class itself.

    Attributes:
        _their_class: the module and the name of the class of Transformers.
    """

    _their_class: ClassVar[tuple[str, str]]

    @property
    def __class__(self) -> type[Any]:  # `isinstance` reads it besides the type
        module, name = self._their_class
        theirs = getattr(sys.modules.get(module), name, None)
        cls: Any = type(self)
        return cls if theirs is None or issubclass(cls, theirs) else _derived(cls, theirs)

    @__class__.setter
    def __class__(self, cls: type[Any]) -> None:  # FSDP and parametrizations assign classes that they derive
        object.__dict__["__class__"].__set__(self, cls)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Python's own way to rebuild the object compares its type with its `__class__`.
        return _new, (type(self),), object.__reduce_ex__(self, 2)[2]


@functools.cache
def _derived(cls: Hashable, theirs: Hashable) -> Any:
    """Return a subclass of both classes whose call builds a `cls`."""
    assert isinstance(cls, type)
    assert isinstance(theirs, type)

    def new(_: Any, *args: Any, **kwargs: Any) -> Any:
        return cls(*args, **kwargs)

    return type(cls.__name__, (cls, theirs), {"__module__": cls.__module__, "__doc__": cls.__doc__, "__new__": new})


def _new(cls: type[T]) -> T:
    return cls.__new__(cls)
