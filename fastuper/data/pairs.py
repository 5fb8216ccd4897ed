"""Photos and label maps of two folders, paired by their names."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastuper.data.listing import Listing, folder_identity, list_images, normal_name
from fastuper.data.samples import DataError
from fastuper.io.messages import about, listed

Pair = tuple[Path, Path]


@dataclass
class Side:
    """One of the two folders: the photos, or the label maps.

    Attributes:
        folder: the folder.
        what: the name of its files in messages, in the plural.
        suffixes: the suffixes of its files, in lower case.
        ending: the end of its files' names before the suffix, which the other side's names lack. Files with another
            ending are left out.
        files: the files found, by their paths inside the folder without ending and suffix, in Unicode's composed form.
        unreadable: such paths of entries that cannot be read.
        links: the files and subfolders that are links.
        others: the number of files that are no images by their suffix.
    """

    folder: Path
    what: str
    suffixes: Collection[str]
    ending: str = ""
    files: dict[str, Path] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    links: set[Path] = field(default_factory=set)
    others: int = 0

    def add(self, inside: str, listing: Listing, problems: dict[Path, str]) -> None:
        """Add the files of a subfolder, and its problems, of which those of files with another ending do not count.

        Raises:
            DataError: two files have one name.
        """
        self.others += listing.others
        self.links |= listing.links
        for path, why in listing.problems.items():
            name = self._name(path)
            if name is not None:
                self.unreadable.add(inside + name)
            if name is not None or path.suffix.lower() not in self.suffixes:
                problems[path] = why
        for path in listing.images:
            name = self._name(path)
            if name is None:
                continue
            other = self.files.setdefault(inside + name, path)
            if other is not path:
                raise DataError(f"{other} and {path} have the same name; take one of them away")

    def _name(self, path: Path) -> str | None:
        """Return a file's name without ending and suffix; None if it has another ending."""
        stem = normal_name(os.path.splitext(path.name)[0])
        return stem[: len(stem) - len(self.ending)] if stem.endswith(self.ending) else None


def pair_files(photos: Side, maps: Side) -> tuple[list[Pair], dict[Path, str]]:
    """Return the pairs of photo and label map in two folders and their subfolders, and what cannot be read.

    Links count as the files and folders that they lead to. Each two folders of one name are entered once, and two files
    are one pair once, however many links lead to them. The other file of a pair that cannot be read is left out.

    Raises:
        DataError: a folder is missing or empty, a photo has no label map, a label map no photo, or two files have one
            name.
    """
    for side in (photos, maps):
        if not os.path.isdir(side.folder):
            raise DataError(f"{side.folder}: there is no such folder of {side.what}")
    problems = _walk(photos, maps)
    for side in (photos, maps):
        if not side.files and not problems:
            pattern = f"names end in {side.ending} and one of" if side.ending else "names end in one of"
            others = f"; it has {side.others} other files" if side.others else ""
            raise DataError(f"{side.folder}: holds no {side.what} ({pattern} {', '.join(side.suffixes)}){others}")
    keys = sorted(photos.files.keys() & maps.files.keys())
    pairs = [(photos.files[key], maps.files[key]) for key in keys]
    _check_alone(photos, maps, {pair[0] for pair in pairs})
    _check_alone(maps, photos, {pair[1] for pair in pairs})
    return _each_once(pairs, photos.links, maps.links), problems


def _walk(photos: Side, maps: Side) -> dict[Path, str]:
    """List the files of both folders, subfolders of one name together; return what cannot be read."""
    problems: dict[Path, str] = {}
    seen: set[object] = set()
    # Links come last, so that files have the names without links.
    pending: list[tuple[str, Path | None, Path | None]] = [("", photos.folder, maps.folder)]
    links: list[tuple[str, Path | None, Path | None]] = []
    while pending or links:
        inside, *here = pending.pop() if pending else links.pop()
        try:
            identity = tuple(None if folder is None else folder_identity(folder) for folder in here)
        except OSError as error:
            problems[Path(str(error.filename))] = str(error.strerror)
            continue
        if identity in seen:
            continue
        seen.add(identity)
        sides = [
            (side, Listing() if folder is None else list_images(folder, side.suffixes))
            for side, folder in zip((photos, maps), here, strict=True)
        ]
        unlisted = {
            folder: listing.problems[folder]
            for folder, (_, listing) in zip(here, sides, strict=True)
            if folder is not None and folder in listing.problems
        }
        if unlisted:  # the files on the other side have no counterparts, which is not their fault
            problems |= unlisted
            continue
        blocked = set()
        for side, listing in sides:
            side.add(inside, listing, problems)
            blocked |= {normal_name(path.name) for path in listing.problems}
        photo_folders, map_folders = (_by_name(listing.folders) for _, listing in sides)
        for name in sorted((photo_folders.keys() | map_folders.keys()) - blocked, reverse=True):
            found = (photo_folders.get(name), map_folders.get(name))
            through_link = any(folder in side.links for folder, (side, _) in zip(found, sides, strict=True))
            (links if through_link else pending).append((f"{inside}{name}/", *found))
    return problems


def _by_name(folders: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        other = found.setdefault(normal_name(folder.name), folder)
        if other is not folder:
            raise DataError(f"{other} and {folder} have the same name; rename one of them")
    return found


def _check_alone(here: Side, there: Side, paired: Collection[Path]) -> None:
    """Raise DataError if files have no counterpart, unless it cannot be read or they are paired under another name."""
    alone = [path for key, path in here.files.items() if key not in there.files and key not in there.unreadable]
    if alone:
        real = {os.path.realpath(path) for path in paired}
        alone = [path for path in alone if os.path.realpath(path) not in real]
    if alone:
        what = there.what[:-1]
        raise DataError(
            f"{len(alone)} of {len(here.files)} {here.what} have no {what} of the same name in {there.folder}: "
            f"{listed(alone)}; add the {what}s or take the {here.what} away"
        )


def _each_once(pairs: Sequence[Pair], *links: Collection[Path]) -> list[Pair]:
    """Return the pairs without those that are, through links, the same two files as another pair."""
    by_links = [pair for pair in pairs if all(path in found for path, found in zip(pair, links, strict=True))]
    if not by_links:
        return list(pairs)
    first: dict[tuple[str, ...], Pair] = {}
    for pair in [*(set(pairs) - set(by_links)), *by_links]:
        first.setdefault(tuple(os.path.realpath(path) for path in pair), pair)
    kept = set(first.values())
    return [pair for pair in pairs if pair in kept]


def described(problems: dict[Path, str], count: int = 3) -> str:
    """Return problems as text: the first with their reasons, and the number of the others."""
    texts = [about(path, why) for path, why in problems.items()]
    more = len(texts) - count
    return ", ".join(texts[:count]) + (f", and {more} more" if more > 0 else "")
