"""The atomic write of a file, used by both packages."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; its file replaces `path` when the block ends, and is removed if it fails.

    Readers find the old file or the whole new file, also if the writer is killed.

    Raises:
        OSError: the file could not be written.
    """
    path = Path(path)
    # A name of its own: the target's name with a suffix may exceed the file system's limit.
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
