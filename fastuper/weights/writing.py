"""Writes the weights of a checkpoint: safetensors or a pickle, one file or shards with an index, all or none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastuper.weights.errors import CheckpointError
from fastuper.weights.filenames import INDEX, PICKLE, SAFETENSORS, file_globs, shard_pattern, with_variant
from fastuper_kernels.dispatch.files import atomic_path


def as_independent(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous tensors that share no memory, as the file formats require; a tensor that is both stays itself.

    Raises:
        CheckpointError: a value is not a tensor, or is on the meta device.
    """
    tensors = {}
    seen = set()
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            fault = "is on the meta device and has no values" if isinstance(tensor, torch.Tensor) else "is not a tensor"
            raise CheckpointError(f"{name} {fault}, and cannot be saved; pass a full state_dict=")
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        # A tensor with two names is written under both, so that no reader misses one. A view is copied, because a
        # pickle would hold its whole base.
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a checkpoint's weights.

    Attributes:
        tensors: for each file, the names of its tensors.
        index: the content of the index by its name; empty if there is only one file.
        replaced: glob patterns of the older files that these files replace.
    """

    tensors: Mapping[str, list[str]]
    index: Mapping[str, Mapping[str, Any]]
    replaced: list[str]

    @property
    def names(self) -> list[str]:
        """The names of all files, the index last."""
        return [*self.tensors, *self.index]


def split_weights(
    tensors: dict[str, torch.Tensor], safe_serialization: bool, max_shard_size: int | str, variant: str | None
) -> WeightFiles:
    """Divide tensors among files; for the arguments see `save_pretrained`."""
    kind = SAFETENSORS if safe_serialization else PICKLE
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=shard_pattern(kind, variant), max_shard_size=max_shard_size
    )
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    # Readers take safetensors first: files of an older save would hide a pickle.
    replaced = [glob for k in dict.fromkeys((kind, SAFETENSORS)) for glob in file_globs(k, variant)]
    return WeightFiles(
        split.filename_to_tensors, {with_variant(kind + INDEX, variant): index} if split.is_sharded else {}, replaced
    )


@contextmanager
def atomic_weights(folder: Path, tensors: Mapping[str, torch.Tensor], files: WeightFiles) -> Iterator[None]:
    """Write all files beside their places; move them there when the block ends, or remove them if it fails.

    A save that fails leaves the older checkpoint of the folder as it was.

    Raises:
        CheckpointError: a file could not be written.
    """
    with ExitStack() as moves:
        for name, content in files.index.items():  # the context entered first moves its file last
            path = moves.enter_context(atomic_path(folder / name))
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, keys in files.tensors.items():
            path = moves.enter_context(atomic_path(folder / name))
            _write(path, {key: tensors[key] for key in keys}, folder / name)
        yield


def remove_replaced(folder: Path, files: WeightFiles) -> None:
    """Delete the weight files of an older save that do not belong to the checkpoint any more."""
    for path in folder.iterdir():
        if path.name not in files.names and any(fnmatchcase(path.name, glob) for glob in files.replaced):
            path.unlink()


def _write(path: Path, tensors: dict[str, torch.Tensor], place: Path) -> None:
    """Write a weight file to `path`; errors name `place`, where it will be moved."""
    try:
        if path.suffix == ".safetensors":
            path.touch()
            mode = path.stat().st_mode
            save_file(tensors, path, metadata={"format": "pt"})
            path.chmod(mode)  # safetensors 0.8 makes files that only their owner may read
        else:
            torch.save(tensors, path)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{place} could not be written (is the disk full?): {error}") from error
