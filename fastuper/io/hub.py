"""Find the files of a checkpoint, in a local folder or in a Hub repository, and upload them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, HfApi, ModelCard, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"


@dataclass(frozen=True)
class HubOptions:
    """Arguments of a download from the Hub, named as in Transformers' `from_pretrained`."""

    token: str | bool | None = None
    cache_dir: str | Path | None = None
    subfolder: str = ""
    revision: str | None = None
    local_files_only: bool = False
    force_download: bool = False

    def __post_init__(self) -> None:
        if self.force_download and self.local_files_only:
            raise ValueError("force_download=True and local_files_only=True contradict each other: leave one out")


def find_file(source: str | os.PathLike[str], filename: str, options: HubOptions | None = None) -> Path | None:
    """Return the local path of a file of a folder or a Hub repository, or None if it has no such file.

    Args:
        source: a folder, or the id of a Hub repository (`"openmmlab/upernet-convnext-tiny"`).
        filename: the file's path inside `source`, or inside `options.subfolder`.
        options: arguments of the download.

    Raises:
        OSError: `source` is neither a folder nor a repository, the Hub cannot be reached, or the folder has something
            else of the file's name (a folder, a pipe, a link that leads nowhere); the message says which.
    """
    options = options or HubOptions()
    folder = Path(source)
    if os.path.isdir(source):  # `Path.is_dir` raises an error for names of great length
        path = folder / options.subfolder / filename
        if path.is_file():
            return path
        if os.path.lexists(path):
            kind = "folder" if path.is_dir() else "pipe or device" if path.exists() else "link that leads to no file"
            raise OSError(f"{path} is a {kind}, where a file is expected")
        return None
    if os.path.exists(source):
        raise NotADirectoryError(
            f"{source} is a file; give the folder that holds config.json and the weights (`fastuper convert` makes "
            "one of another library's checkpoint)"
        )
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
                force_download=options.force_download,
            )
        )
    except HFValidationError:
        raise FileNotFoundError(f"{source} is neither a folder here nor the id of a Hub repository") from None
    except GatedRepoError:  # a kind of RepositoryNotFoundError
        raise PermissionError(
            f"{source} is gated: only accounts that accepted its terms can read it; accept them on the Hub, then pass "
            "`token=`"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{source} is neither a folder here nor a repository on the Hub; a private one needs `token=`"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{source} has no revision {options.revision!r} on the Hub") from None
    except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError: the file may exist on the Hub
        if _is_known_missing(source, filename, options):
            return None
        raise OSError(
            f"{source} is not a folder here, its {filename} not in the local cache, and the Hub cannot be reached "
            f"(with HF_HUB_OFFLINE=1 files missing from the cache count as missing): {error}"
        ) from None
    except EntryNotFoundError:
        return None


def _is_known_missing(source: str | os.PathLike[str], filename: str, options: HubOptions) -> bool:
    """Return True if the repository is taken to lack a file that the cache lacks, without asking the Hub.

    Either the cache records that the Hub had no such file, or the search is limited to a cache that has config.json.
    """

    def cached(name: str) -> Any:
        name = f"{options.subfolder}/{name}" if options.subfolder else name
        return try_to_load_from_cache(str(source), name, cache_dir=options.cache_dir, revision=options.revision)

    if cached(filename) is _CACHED_NO_EXIST:
        return True
    return (options.local_files_only or constants.HF_HUB_OFFLINE) and isinstance(cached(CONFIG_NAME), str)


def pin_revision(source: str | os.PathLike[str], options: HubOptions) -> HubOptions:
    """Return options whose revision is a commit, so that all files of a checkpoint come from one commit.

    With a commit as the revision, cached files are also used without asking the Hub. The options stay unchanged for
    a folder and for a repository without config.json.

    Raises:
        OSError: as in `find_file`.
    """
    if Path(source).is_dir():
        return options
    path = find_file(source, CONFIG_NAME, options)
    if path is None:
        return options
    # .../models--organization--name/snapshots/<commit>/<subfolder>/config.json
    return replace(options, revision=path.parents[len(Path(options.subfolder).parts)].name)


def upload(
    folder: Path,
    names: Sequence[str],
    repo_id: str,
    *,
    replaced: Sequence[str] = (),
    commit_message: str,
    commit_description: str | None = None,
    tags: Sequence[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload files of a folder to a Hub repository, which is made if it is missing; return the commit's URL.

    Args:
        folder: the folder.
        names: the files' names.
        repo_id: "name" or "organization/name".
        replaced: patterns of files of the repository that the commit deletes.
        commit_message: of the commit.
        commit_description: of the commit.
        tags: tags to add to the repository's model card; it is made if it is missing.
        private: whether a new repository is private; the account's default if None.
        token: the token; True or None for the token that `hf auth login` stored.
        revision: the branch; made if it is missing.
        create_pr: open a pull request instead of committing.

    Raises:
        OSError: the Hub refused the request.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if tags:
        try:
            card = ModelCard.load(repo_id, token=token)  # type: ignore[arg-type]
        except EntryNotFoundError:
            card = ModelCard("---\n{}\n---\n")
        card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *tags]))
        card.save(folder / CARD_NAME)
        names = [*names, CARD_NAME]
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=list(names),
        delete_patterns=list(replaced),
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )
    return commit.commit_url
