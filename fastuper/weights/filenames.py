"""The names of a checkpoint's weight files, as Transformers gives them."""

from __future__ import annotations

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
# The suffix of an index, a JSON file that names the file ("shard") of each tensor.
INDEX = ".index.json"


def with_variant(filename: str, variant: str | None) -> str:
    """Return a file's name with a variant before its last extension: `model.fp16.safetensors`."""
    stem, dot, extension = filename.rpartition(".")
    return f"{stem}.{variant}{dot}{extension}" if variant else filename


def shard_pattern(kind: str, variant: str | None) -> str:
    """Return the name of a shard of `SAFETENSORS` or `PICKLE`; {suffix} stands for its number ("-00001-of-00002")."""
    return "{suffix}.".join(with_variant(kind, variant).rsplit(".", 1))


def file_globs(kind: str, variant: str | None) -> list[str]:
    """Return glob patterns of the files that a checkpoint of `SAFETENSORS` or `PICKLE` can consist of."""
    number = "[0-9]" * 5
    shards = shard_pattern(kind, variant).format(suffix=f"-{number}-of-{number}")
    return [with_variant(kind, variant), shards, with_variant(kind + INDEX, variant)]
