"""Class names of a dataset's classes.txt or id2label.json. The rules are strict: no name gets another's number."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from pathlib import Path

from fastuper.data.samples import DataError, are_numbered
from fastuper.io.files import read_json

_NUMBERED = re.compile(r"(\d+)\s*[:,;=\t]\s*(.+)")


def read_class_list(root: Path) -> dict[int, str] | None:
    """Return the class names of a folder's classes.txt or id2label.json; None if it has neither file.

    classes.txt is UTF-8 text with a name on each line, class 0 first. Lines end with LF or CRLF; spaces around a name,
    empty lines at the end and a byte order mark are ignored. If every line begins with its number and a colon, comma,
    semicolon, equals sign or tab, the names are without them.

    Raises:
        DataError: a file cannot be read, a line has no name, a name stands twice, a number is not its line's, or the
            two files differ; the message names the file and the line.
    """
    listed, mapped = root / "classes.txt", root / "id2label.json"
    names = _read_lines(listed) if _is_there(listed) else None
    classes = _read_numbers(mapped) if _is_there(mapped) else None
    if names is not None and classes is not None and names != classes:
        raise DataError(f"{listed} and {mapped} name different classes; take one of them away")
    return classes if names is None else names


def _is_there(path: Path) -> bool:
    """Return True if a file exists.

    Raises:
        DataError: the path is no file, or cannot be read.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if not os.path.lexists(path):
            return False
        raise DataError(f"{path}: {error.strerror}; a link must lead to a file that can be read") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is no file; write the names of the classes into a file of this name")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: no permission to read it")
    return True


def _read_lines(path: Path) -> dict[int, str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8; save it in that encoding") from None
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")]
    if lines == [""]:
        raise DataError(f"{path}: is empty; write a class name on each line, class 0 first")
    for number, line in enumerate(lines, 1):
        if not line:
            raise DataError(
                f"{path}: line {number} is empty, so that the number of the classes after it is not certain; write a "
                "name there, or remove the line"
            )
        if line.startswith("#"):
            raise DataError(f"{path}: line {number} begins with #; write class names only, one on each line")
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if all(numbered):
        for index, match in enumerate(numbered):
            assert match is not None
            if int(match[1]) != index:
                raise DataError(
                    f"{path}: line {index + 1} has the number {match[1]}, but the classes of the lines count from 0 "
                    f"without gaps, and it is class {index}; sort and number the lines so, or write the names alone"
                )
        lines = [match[2] for match in numbered if match is not None]
    first: dict[str, int] = {}
    for number, name in enumerate(lines, 1):
        wrong = next((letter for letter in name if unicodedata.category(letter) == "Cc"), None)
        if wrong is not None:
            what = "a tab" if wrong == "\t" else f"the control character {wrong!r}"
            raise DataError(f"{path}: line {number} has {what} inside; write class names only, one on each line")
        if name in first:
            raise DataError(f"{path}: lines {first[name]} and {number} have the same name {name}; give each its own")
        first[name] = number
    return dict(enumerate(lines))


def _read_numbers(path: Path) -> dict[int, str]:
    content = read_json(path)
    names = {int(number): name for number, name in content.items() if re.fullmatch(r"0|[1-9][0-9]{0,8}", number)}
    if (
        len(names) != len(content)
        or not are_numbered(names)
        or not all(isinstance(name, str) and name.strip() for name in names.values())
    ):
        raise DataError(f'{path}: write {{"0": "name", "1": "name", ...}}, numbered from 0 without gaps')
    return dict(sorted(names.items()))
