"""Files of a checkpoint folder or a Hub repository: finding them, and writing them whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@dataclass(frozen=True)
class HubOptions:
    """Where on the Hub to look, and how; the arguments of the same names of Transformers' `from_pretrained`."""

    token: str | bool | None = None
    cache_dir: str | Path | None = None
    subfolder: str = ""
    revision: str | None = None
    local_files_only: bool = False


def find_file(source: str | os.PathLike[str], filename: str, options: HubOptions | None = None) -> Path | None:
    """Return the local path of `filename` in a folder or a Hub repository, or None where it has no such file.

    Args:
        source: a folder, or the id of a Hub repository (`"openmmlab/upernet-convnext-tiny"`).
        filename: the file's name inside it (inside `options.subfolder`, where that is given).
        options: where on the Hub to look.

    Raises:
        OSError: `source` is neither a folder nor a repository that can be reached; the message says which.
    """
    options = options or HubOptions()
    folder = Path(source)
    if folder.is_dir():
        path = folder / options.subfolder / filename
        return path if path.is_file() else None
    if folder.exists():
        raise NotADirectoryError(f"{source} is a file; give the folder that holds config.json and the weights")
    try:
        return Path(
            hf_hub_download(
                str(source),
                filename,
                subfolder=options.subfolder or None,
                token=options.token,
                cache_dir=options.cache_dir,
                revision=options.revision,
                local_files_only=options.local_files_only,
            )
        )
    except HFValidationError:
        raise FileNotFoundError(f"{source} is neither a folder here nor the id of a Hub repository") from None
    except GatedRepoError:  # a kind of RepositoryNotFoundError
        raise PermissionError(
            f"{source} is open only to those who accepted its terms on the Hub; do so there, then pass `token=`"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{source} is neither a folder here nor a repository on the Hub; a private one needs `token=`"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{source} has no revision {options.revision!r} on the Hub") from None
    except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError: not known, rather than known not to exist
        if _is_known_missing(source, filename, options):
            return None
        raise OSError(
            f"{source} is not a folder here, its {filename} not in the local cache, and the Hub cannot be reached "
            f"(HF_HUB_OFFLINE=1 takes what the cache has for all there is): {error}"
        ) from None
    except EntryNotFoundError:
        return None


def _is_known_missing(source: str | os.PathLike[str], filename: str, options: HubOptions) -> bool:
    """Whether a file that is not in the cache can be taken as not in the repository, without asking the Hub.

    That is so where the Hub has said it before, or where only the cache was to be looked at and has the rest.
    """

    def cached(name: str) -> Any:
        name = f"{options.subfolder}/{name}" if options.subfolder else name
        return try_to_load_from_cache(str(source), name, cache_dir=options.cache_dir, revision=options.revision)

    if cached(filename) is _CACHED_NO_EXIST:
        return True
    return (options.local_files_only or constants.HF_HUB_OFFLINE) and isinstance(cached("config.json"), str)


def pin_revision(source: str | os.PathLike[str], options: HubOptions) -> HubOptions:
    """Return options that mean the commit which the revision means now, so that all files come from one commit.

    Files of a known commit that are in the cache are also taken without asking the Hub. A folder, or a repository
    without config.json, leaves the options as they are.

    Raises:
        OSError: as `find_file`.
    """
    if Path(source).is_dir():
        return options
    path = find_file(source, "config.json", options)
    if path is None:
        return options
    # .../models--organization--name/snapshots/<commit>/<subfolder>/config.json
    return replace(options, revision=path.parents[len(Path(options.subfolder).parts)].name)


def reason(error: BaseException) -> str:
    """Return an error's message on one line, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; the error names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OSError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise OSError(f"{path} holds {type(value).__name__} where a JSON object is expected")
    return value


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes `path`'s place when the block ends, and goes if it fails.

    A reader sees the old file or the new one, never a part of it, whenever the writer is stopped.
    """
    path = Path(path)
    # Not the target's name with something added: that may be as long as a name can be.
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new folder beside `path` to write files into; it becomes `path` when the block ends, or goes if it fails.

    A reader sees no folder or the whole of it, whenever the writer is stopped or the power fails: the files are on the
    disk before the folder has its name. A writer that is killed leaves a hidden folder behind, `.` and 32 digits.

    Raises:
        OSError: `path` is there already, or something could not be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        for file in [*temporary.iterdir(), temporary]:
            _flush(file)
        os.rename(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
