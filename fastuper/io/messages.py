"""Messages for people: one line each."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """Return an error's message on one line, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
