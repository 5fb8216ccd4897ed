"""Silence for libraries that print: what they write, log and warn is of no use to the caller."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Within this context the process prints, logs and warns nothing.

    Compilers and libraries in C++ write to the descriptors 1 and 2, Python writes to `sys.stdout` and `sys.stderr`,
    which may lead elsewhere: both are silent, for all threads.
    """
    level = logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # it is closed, as in a program without a terminal
                kept = os.dup(descriptor)
                stack.callback(os.close, kept)
                stack.callback(os.dup2, kept, descriptor)
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), descriptor)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, level)
        logging.disable(logging.CRITICAL)
        yield
