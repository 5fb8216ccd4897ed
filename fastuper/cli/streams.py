"""Standard input, output and error of the commands, made safe to use.

- All three are there, also where the caller closed them (`2>&-`, a service, pythonw).
- A write that fails (a full disk, a reader that went away) stops no work: `Streams.leave` reports it at the end.
- Control characters in the text are escaped, whoever prints it: file and class names cannot steer the terminal.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import select
import sys
from typing import Any

from fastuper.io.messages import printable

_MOVES = re.compile(r"\r|\n*(\x1b\[A)+$")  # a progress bar's: to the start of the line, or up a few lines


class Streams:
    """Put safe streams in the places of `sys.stdin`, `sys.stdout` and `sys.stderr`."""

    def __init__(self) -> None:
        _open_closed_descriptors()
        if sys.stdin is None:
            sys.stdin = open(os.devnull)  # noqa: SIM115
        sys.stdout, sys.stderr = _safe(sys.stdout), _safe(sys.stderr)

    def leave(self, status: Any) -> None:
        """End the process with a status; if the output could not be written, say so, and make status 0 status 1.

        A reader that went away (`| head`) has what it wanted: that is no failure.
        """
        sys.stdout.flush()
        error = sys.stdout.sink.error if isinstance(sys.stdout, _Text) else None
        if error is not None and not isinstance(error, BrokenPipeError):
            print(f"fastuper: cannot write to standard output: {error.strerror}", file=sys.stderr)
            status = status or 1
        sys.exit(status)


class _Sink(io.RawIOBase):
    """The bytes of a stream. After a write has failed, further bytes are dropped, and `error` is the failure."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        written = 0
        size = len(data)
        while self.error is None and written < size:
            try:
                count = self.target.write(data[written:])
            except OSError as error:
                self.error = error
            else:
                if count is None:  # the descriptor does not block, and the reader is slow
                    select.select([], [self.target], [])
                written += count or 0
        return size

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.target.isatty()

    def fileno(self) -> int:
        return self.target.fileno()


class _Text(io.TextIOWrapper):
    """Text with control characters escaped, apart from line ends and, on a terminal, a progress bar's movements."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        stream.flush()
        self.beneath = stream  # it would close its descriptor if it were deleted
        self.sink = _Sink(getattr(stream.buffer, "raw", stream.buffer))  # unbuffered: an error comes once
        # typer writes UTF-8 where the encoding is ASCII, past this object if it were ASCII too. File and class names
        # may have letters that other encodings lack.
        encoding = "utf-8" if codecs.lookup(stream.encoding).name == "ascii" else stream.encoding
        buffer = io.BufferedWriter(self.sink)
        super().__init__(buffer, encoding=encoding, errors="backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        moves = _MOVES.match(text) if self.isatty() else None
        start = moves.end() if moves else 0
        super().write(text[:start] + "\n".join(map(printable, text[start:].split("\n"))))
        return len(text)


def _safe(stream: Any) -> Any:
    """Return a stream that no write can fail on; streams without a file beneath them, as in notebooks, stay."""
    if stream is None:
        stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return _Text(stream) if isinstance(stream, io.TextIOWrapper) else stream


def _open_closed_descriptors() -> None:
    """Open the null device where descriptor 0, 1 or 2 is closed: a file of ours must not take its number.

    Libraries write messages to descriptor 2, whatever it is.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number
