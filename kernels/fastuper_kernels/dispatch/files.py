"""The atomic write of both packages."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to. It replaces `path` when the block ends; if the block fails it goes.

    A reader sees the old file or the new file, never a part of it, whenever the writer is stopped.
    """
    path = Path(path)
    # Not the target's name with something added: that may be as long as a name can be.
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
