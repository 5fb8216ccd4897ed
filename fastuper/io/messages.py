"""Text for people: messages on one line, lists of names, sizes, control characters escaped."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence

LIMIT = 400
"""Characters of a message on the terminal; `one_line` cuts the middle out of longer messages."""

NAME_LIMIT = 200
"""Characters of a file's name in a message; `name_of` cuts the middle out of longer names."""

EXPECTED_ERRORS = (OSError, ValueError, RuntimeError, MemoryError)
"""Errors that bad input or a full machine can cause: a file, its values, torch out of memory, a full disk."""

_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogate, line separator, paragraph separator


def printable(text: str) -> str:
    r"""Return text with control characters escaped, so that a file's name cannot steer the terminal.

    Escape sequences begin with a control character (ESC is written as `\x1b`). Characters that reverse the direction
    of writing, separators of lines, and bytes of names that are not UTF-8 are escaped too.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(letter) if unicodedata.category(letter) in _ESCAPED else letter for letter in text)


def _escape(letter: str) -> str:
    # Joiners and the soft hyphen (also of category Cf) belong to the spelling of words and emoji.
    return letter if letter in "\u00ad\u200c\u200d" else letter.encode("unicode_escape").decode("ascii")


def reason(error: BaseException) -> str:
    """Return an error's message on one line, whole, or the name of its type if the message is empty."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def one_line(message: BaseException | str) -> str:
    """Return a message on one line of at most `LIMIT` characters.

    The middle of a longer message is left out. The beginning, which names the file, and the end, which names the
    remedy, stay.
    """
    if isinstance(message, BaseException):
        text = reason(message)
    else:
        text = printable(" ".join(message.split()))
    return _shortened(text, LIMIT, LIMIT * 3 // 4)


def name_of(path: str | os.PathLike[str]) -> str:
    """Return a file's name for a message, of at most `NAME_LIMIT` characters; of a longer name the end is kept."""
    return _shortened(printable(os.fspath(path)), NAME_LIMIT, NAME_LIMIT // 4) or "''"


def about(path: str | os.PathLike[str], error: BaseException | str) -> str:
    """Return `NAME: REASON` on one line; however long the name is, both are there.

    Args:
        path: the file.
        error: the error or its message. If the message begins with the file's name, the name is not repeated.
    """
    if isinstance(error, OSError) and error.strerror:
        error = error.strerror  # without number and path
    text = str(error).removeprefix(f"{os.fspath(path)}: ") or type(error).__name__
    return f"{name_of(path)}: {one_line(text)}"


def _shortened(text: str, limit: int, start: int) -> str:
    """Return text of at most `limit` characters; of longer text, the first `start` characters and the last."""
    gap = " ... "
    return text if len(text) <= limit else text[:start] + gap + text[start + len(gap) - limit :]


def listed(names: Iterable[object], count: int = 3) -> str:
    """Return the first names of a list, separated by commas, and `...` if there are more; `none` without names."""
    texts = [printable(str(name)) for name in names]
    return (", ".join(texts[:count]) or "none") + (", ..." if len(texts) > count else "")


def format_size(size: Sequence[int]) -> str:
    """Return a size as text: (480, 640) is `480 x 640`."""
    return " x ".join(map(str, size))


def shown(value: object) -> str:
    """Return a value as text of at most 60 characters; the middle of a longer text is left out."""
    try:
        text = printable(repr(value))
    except (ValueError, RecursionError):  # an integer of more than 4300 digits; a list that holds itself
        text = f"{type(value).__name__} of great size"
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}"
