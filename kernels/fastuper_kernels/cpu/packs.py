"""Packs: weights rearranged once for the CPU loops, and made again after the weights have changed.

`id`, `data_ptr` and `_version` do not show that a weight has changed. A fused optimizer, a write through `.data` and a
write in inference mode leave all three equal. So `fingerprint` sums the contents at each use, at the speed of memory.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fastuper_kernels.dispatch.torch_private import storage_id

# The most packs of all models together. A model has about twenty; when its weights are freed, its packs are too.
MAX_PACKS = 256

# Values of a weight per multiplication.
BLOCK = 1 << 18

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint:
    """Sums over the contents of a weight; two are equal if all their bits are."""

    def __init__(self, *sums: torch.Tensor):
        self.sums = [x.view(_INTEGERS[x.element_size()]) for x in sums]  # as a float, NaN would differ from itself

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and all(map(torch.equal, self.sums, other.sums))

    __hash__ = None  # type: ignore[assignment]


class _Entry(NamedTuple):
    storage: weakref.ref[torch.UntypedStorage]  # a pack does not keep its weights alive
    fingerprint: Fingerprint
    vector: torch.Tensor | None
    pack: Any


class _Verified(threading.local):
    keys: set[tuple[Any, ...]] | None = None  # within `fingerprint_once`: the packs that this thread has verified


_entries: dict[tuple[Any, ...], _Entry] = {}
_verified = _Verified()
_lock = threading.RLock()  # reentrant: the garbage collector may free weights, and with them packs, at any line


def packed(
    weight: torch.Tensor, kind: Callable[..., Any], dtype: torch.dtype, vector: torch.Tensor | None = None
) -> Any:
    """Return `kind(weight, dtype)`, from an earlier call if the weight's contents are still the same.

    Args:
        weight: an ordinary tensor, or a view of an ordinary tensor.
        kind: the function that rearranges the weight; it must return new tensors.
        dtype: the dtype of the result.
        vector: if given, the result is `kind(weight, dtype, vector)`, and a change of the vector's contents counts too.
    """
    storage = weight.untyped_storage()
    place = (storage_id(storage), weight.storage_offset(), weight.shape, weight.stride(), weight.dtype)
    key = (kind, dtype, *place, None if vector is None else vector.dtype)
    found, verified, now = _entries.get(key), _verified.keys, None
    fits = found is not None and found.storage() is storage and _same(vector, found.vector)
    if not fits or verified is None or key not in verified:
        now = fingerprint(weight)
    if verified is not None:
        verified.add(key)
    if found is not None and fits and (now is None or found.fingerprint == now):
        return found.pack
    assert now is not None
    with torch.inference_mode(False), torch.no_grad():
        values = weight.detach().clone() if weight.is_inference() else weight.detach()
        kept = None if vector is None else vector.detach().clone()
        pack = kind(values, dtype) if kept is None else kind(values, dtype, kept)
    with _lock:
        _entries.pop(key, None)
        _entries[key] = _Entry(weakref.ref(storage, functools.partial(_forget, key)), now, kept, pack)
        while len(_entries) > MAX_PACKS:
            _entries.pop(next(iter(_entries)), None)
    return pack


@contextlib.contextmanager
def fingerprint_once() -> Iterator[None]:
    """Inside this context each weight is fingerprinted once per thread: for a loop over the strips of a map.

    The weights must not change inside the context.
    """
    outer, _verified.keys = _verified.keys, set()
    try:
        yield
    finally:
        _verified.keys = outer


def _same(vector: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return vector is other if vector is None or other is None else torch.equal(vector, other)


def _forget(key: tuple[Any, ...], storage: weakref.ref[torch.UntypedStorage]) -> None:
    entry = _entries.get(key)
    if entry is not None and entry.storage is storage:
        _entries.pop(key, None)


@torch.no_grad()
def fingerprint(weight: torch.Tensor) -> Fingerprint:
    """Return sums over the contents of a weight (C_out, ...).

    The weight is read as a matrix (C_out, values), and its bits as integers. Each row and each column has a sum, so a
    single changed bit shows, and so do two values that swapped places. The sums are modulo 2^64: an even number of
    flipped signs cancels, and values that swapped places in several rows do not show. Therefore each row, as numbers,
    is also multiplied by random numbers. The product is in float32 at least: in bfloat16 many of the random numbers
    would be equal.
    """
    # The values are read in the order of memory, at full speed: a slice of channels_last weights is contiguous along
    # the channels.
    weight = weight.detach()
    lines = weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight
    if lines.is_contiguous():
        weight = lines.flatten(1)
        parts = [weight]
    elif weight.ndim == 4 and weight.stride(1) == 1 and weight.shape[2:] != (1, 1):
        weight = lines
        parts = [part for line in weight.unbind(1) for part in line.unbind(1)]
    else:
        weight = weight.flatten(1)
        parts = [weight]
    size = weight.element_size()
    bits = weight.view(_INTEGERS[size])
    # The bits are 64-bit integers where sizes allow: PyTorch sums narrower integers at a tenth of the speed.
    strides = (*weight.stride()[:-1], weight.shape[-1], weight.storage_offset())
    if weight.stride(-1) == 1 and all(stride * size % 8 == 0 for stride in strides):
        bits = bits.view(torch.int64)
    rows = bits.sum(dim=tuple(range(1, bits.ndim)), dtype=bits.dtype if size >= 4 else torch.int64)
    columns = bits.sum(dim=0, dtype=rows.dtype)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    keys = _keys_for(dtype, weight.shape[1:].numel()).split([part.shape[1] for part in parts])
    products = torch.stack([_product(part, key) for part, key in zip(parts, keys, strict=True)])
    return Fingerprint(rows, columns, products)


def _product(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return x @ key in key's dtype, in blocks of rows that fit in a cache.

    `torch.mv` would not do: its sums in MKL depend on the number of threads, and a new number would pack all weights
    again.
    """
    step = max(1, BLOCK // max(1, x.shape[1]))
    block, sums = key.new_empty(min(step, len(x)), x.shape[1]), key.new_empty(len(x))
    for start in range(0, len(x), step):
        rows = x[start : start + step]
        torch.sum(torch.mul(rows, key, out=block[: len(rows)]), 1, out=sums[start : start + step])
    return sums


_all_keys: dict[torch.dtype, torch.Tensor] = {}


def _keys_for(dtype: torch.dtype, count: int) -> torch.Tensor:
    """Return `count` random numbers between -1 and 1, the same at every call."""
    keys = _all_keys.get(dtype)
    if keys is None or len(keys) < count:
        with torch.inference_mode(False):
            generator = torch.Generator("cpu").manual_seed(0)
            keys = torch.rand(2 * count, generator=generator, dtype=torch.float64, device="cpu").mul(2).sub(1).to(dtype)
        _all_keys[dtype] = keys
    return keys[:count]


def packed_bytes() -> int:
    """Return the bytes of all packs in memory."""

    def size(pack: Any) -> int:
        if isinstance(pack, torch.Tensor):
            return pack.numel() * pack.element_size()
        return sum(size(part) for part in pack) if isinstance(pack, list | tuple) else 0

    with _lock:
        return sum(size(entry.pack) for entry in list(_entries.values()))


def clear() -> None:
    """Free every pack."""
    with _lock:
        _entries.clear()
