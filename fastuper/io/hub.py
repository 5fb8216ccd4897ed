"""Files of a checkpoint: in a local folder or a Hub repository."""

from __future__ import annotations

import os
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
