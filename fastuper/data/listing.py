"""The images of a folder, and what in the folder cannot be read: nothing is left out in silence.

This file imports neither torch nor Pillow, so that commands can list photos at once.
"""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Listing:
    """The entries of a folder. Hidden entries, whose names begin with a dot, are in none of the lists.

    Attributes:
        images: the regular files with an image's suffix that can be read, sorted by name.
        folders: the subfolders, sorted by name; whether they can be read shows when they are listed.
        links: the entries that are links to an existing file or folder.
        problems: the reason for each entry with an image's suffix, and each link, that cannot be read. The folder
            itself is a key if its entries cannot be listed.
        others: the number of files of other suffixes.
    """

    images: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    links: set[Path] = field(default_factory=set)
    problems: dict[Path, str] = field(default_factory=dict)
    others: int = 0


def list_images(folder: str | os.PathLike[str], suffixes: Collection[str]) -> Listing:
    """List the images directly inside a folder. No file is opened, and no subfolder is entered.

    A link counts as the file or folder that it leads to, under its own name. Links that lead nowhere or in a circle,
    files without permission to read, FIFOs, sockets and devices are problems.

    Args:
        folder: the folder.
        suffixes: the suffixes of images, in lower case, each with its dot; a file's suffix may be in any case.
    """
    found = Listing()
    entries: list[os.DirEntry[str]] = []
    try:
        with os.scandir(folder) as scan:
            entries.extend(scan)
    except OSError as error:  # the entries before the error stay
        found.problems[Path(folder)] = _reason(error)
    for entry in sorted(entries, key=lambda entry: (normal_name(entry.name), entry.name)):
        if entry.name.startswith("."):
            continue
        path, is_image = Path(folder, entry.name), os.path.splitext(entry.name)[1].lower() in suffixes
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            if is_image or entry.is_symlink():  # the link may stand for a folder of images
                found.problems[path] = _link_reason(path, error) if entry.is_symlink() else _reason(error)
            else:
                found.others += 1
            continue
        if entry.is_symlink():
            found.links.add(path)
        if stat.S_ISDIR(mode):
            found.folders.append(path)
        elif not is_image:
            found.others += 1
        elif not stat.S_ISREG(mode):
            found.problems[path] = f"is a {_kind(mode)}, not a file"
        elif not os.access(path, os.R_OK):
            found.problems[path] = "no permission to read it"
        else:
            found.images.append(path)
    return found


def normal_name(name: str) -> str:
    """Return a name in Unicode's composed form: macOS decomposes accented letters in names, other systems do not."""
    return unicodedata.normalize("NFC", name)


def folder_identity(folder: str | os.PathLike[str]) -> object:
    """Return a value that is equal for two names of one folder, through links, mounts or letters in another case.

    Raises:
        OSError: the folder cannot be examined.
    """
    status = os.stat(folder)
    # Some file systems number no entries.
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def _reason(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return "no permission to read it"
    return error.strerror or type(error).__name__


def _link_reason(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "is a link that leads in a circle"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        try:
            return f"is a link to {os.readlink(path)}, which does not exist"
        except OSError:
            return "is a link to nothing"
    return _reason(error)


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "FIFO"
    return "socket" if stat.S_ISSOCK(mode) else "device"
