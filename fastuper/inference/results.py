"""What made the files of an output folder: `results.jsonl`, a line of JSON for each photo.

A line is appended, and flushed to the disk, after the photo's files are in place. Its fields:

- photo: the photo's path, absolute, with links to folders resolved.
- command: the command that wrote the line, "segment" or "parse".
- bytes, sha256: the size and the SHA-256 of the photo's file; null if it could not be read.
- width, height: the photo's size in pixels, upright; null if it failed.
- model: the SHA-256 of weights, configuration and image processor (`model_digest`).
- options: everything else that changes the result.
- version: the version of this library.
- outputs: the size and the SHA-256 of each file that was written, by its name in the folder; {} if the photo failed.
- shares: the classes that occur, by descending share: class number, name, and share of the pixels; [] if it failed. Of
  "parse", the classes of objects; [] if no objects were asked for.
- error: the reason why the photo failed, or null.

Each line says all about its photo, in any order with other lines: files of several processes can be concatenated. If a
photo has several lines of a command, the last line without an error counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from fastuper.io.files import file_digest, flush
from fastuper.io.messages import name_of
from fastuper.io.version import __version__

try:
    import fcntl
except ImportError:  # Windows: two runs at once in one folder are not kept apart
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from fastuper.data.processor import UperNetImageProcessor
    from fastuper.models.model_methods import ModelMethods

RESULTS = "results.jsonl"
PENDING = ".results.pending"
"""The file, during a run, with the names of files that no line names yet. After a killed run they are removed."""

_LONGEST_NAME = 255  # bytes of a file's name, in all usual file systems


class Content(NamedTuple):
    """The size and the SHA-256 of a file's content."""

    bytes: int
    sha256: str


class Maker(NamedTuple):
    """What makes results.

    Attributes:
        model: `model_digest` of the model and its image processor.
        options: all options that change the result, of JSON types.
    """

    model: str
    options: dict[str, Any]


class _Line(NamedTuple):
    """A line of a photo that has results; `start` is its place in the file."""

    command: str
    photo: str
    start: int
    content: Content
    maker: Maker
    outputs: dict[str, Content]


class Results:
    """The record of an output folder, for one run at a time; a context manager.

    Args:
        folder: the folder, which exists.
        command: the command that runs. The results of other commands stay as they are.
        notify: is called with a message: for each damaged line, and if another run has to end first.

    Raises:
        OSError: `results.jsonl` cannot be read and written.
    """

    def __init__(self, folder: str | os.PathLike[str], command: str, notify: Callable[[str], None]) -> None:
        self.folder = Path(folder)
        self.command = command
        self._lines: dict[str, _Line] = {}  # of this command, by photo
        self._owners: dict[str, str] = {}  # photos by the names of their files
        self._begun: set[str] = set()  # names of files that no line names yet
        self._pending: Any = None
        self._file = os.open(
            self.folder / RESULTS, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666
        )
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise OSError(f"{name_of(self.folder / RESULTS)} is not a regular file; move it away")
            self._wait_for_others(notify)
            self._read(notify)
            self._remove_unfinished()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._begun):
            self.drop([name])
        if self._pending is not None:
            self._pending.close()
            (self.folder / PENDING).unlink(missing_ok=True)
        os.close(self._file)

    def choose_names(
        self, photos: Sequence[str], endings: Sequence[str], avoid: Collection[str] = ()
    ) -> list[list[str]]:
        """Return the names of the files of each photo of this run.

        A photo keeps the names that a line gives it, also if the photo was moved: then a file of its name and content
        is now elsewhere, and the old path is gone. All others get the photo's name and an ending, with a number if
        another photo of this run or a file that no line names has that name. So new results replace those of a photo
        that is not in this run, and no other files. A name that would be too long is shortened.

        Args:
            photos: the photos, from `identity`.
            endings: the end of each name, of all files that the command can write.
            avoid: paths that are no results: the photos of this run.
        """
        self._find_moved(photos)
        folder = os.path.realpath(self.folder)

        def usable(names: Sequence[str]) -> bool:
            return not any(os.path.join(folder, name) in avoid for name in names) and all(
                name in self._owners or not os.path.lexists(self.folder / name) for name in names
            )

        known = {}
        for photo in photos:
            outputs = self._lines[photo].outputs if photo in self._lines else {}
            stems = [name.removesuffix(ending) for name in outputs for ending in endings if name.endswith(ending)]
            names = [f"{stem}{ending}" for stem in stems[:1] for ending in endings]
            if names and usable(names):
                known[photo] = names
        # In lower case: on some file systems A.png and a.png are one file.
        taken = {name.casefold() for names in known.values() for name in names}
        numbers: Counter[str] = Counter()
        for photo in photos:
            stem = os.path.splitext(os.path.basename(photo))[0]
            while photo not in known:
                numbers[stem.casefold()] += 1
                names = names_of_files(stem, numbers[stem.casefold()], endings)
                if usable(names) and not any(name.casefold() in taken for name in names):
                    known[photo] = names
                    taken.update(name.casefold() for name in names)
        return [known[photo] for photo in photos]

    def owner(self, name: str) -> str | None:
        """Return the photo whose line names a file, or None."""
        return self._owners.get(name)

    def has(self, photo: str, content: Content, maker: Maker) -> bool:
        """Return True if the folder has this photo's results, from this content, model and options, and unchanged."""
        line = self._lines.get(photo)
        if line is None or (line.content, line.maker) != (content, maker):
            return False
        try:
            return all(content_of(self.folder / name) == expected for name, expected in line.outputs.items())
        except OSError:
            return False

    def begin(self, names: Sequence[str]) -> None:
        """Note names before their files are written. If the run is killed before `add`, the next run removes the files.

        Raises:
            OSError: the names cannot be noted.
        """
        new = [name for name in names if name not in self._owners]
        if self._pending is None:
            self._pending = open(self.folder / PENDING, "a", encoding="ascii")  # noqa: SIM115
        self._pending.writelines(json.dumps(name) + "\n" for name in new)
        self._pending.flush()
        self._begun.update(new)

    def add(
        self,
        photo: str,
        content: Content | None,
        maker: Maker,
        *,
        size: tuple[int, int] | None = None,
        names: Sequence[str] = (),
        shares: Sequence[Mapping[str, Any]] = (),
        error: str | None = None,
    ) -> None:
        """Append a photo's line; its files, `names`, are flushed to the disk first.

        Files of earlier results that these results replace, and that are not among the names, are removed.

        Args:
            photo: the photo, from `identity`.
            content: the content of the photo's file; None if it could not be read.
            maker: the model and the options.
            size: (height, width) of the photo.
            names: the files in the folder.
            shares: see the module's docstring.
            error: why the photo failed.

        Raises:
            OSError: a file or the line could not be written; then the record has no part of the line.
        """
        outputs = {name: _flushed_content(self.folder / name) for name in names}
        if names and os.name != "nt":  # Windows cannot open folders
            flush(self.folder)
        start = self._append(
            {
                "photo": photo,
                "command": self.command,
                "bytes": content and content.bytes,
                "sha256": content and content.sha256,
                "width": size and size[1],
                "height": size and size[0],
                "model": maker.model,
                "options": maker.options,
                "version": __version__,
                "outputs": {name: output._asdict() for name, output in outputs.items()},
                "shares": list(shares),
                "error": error,
            }
        )
        if content is not None and error is None:
            for name in self._remember(_Line(self.command, photo, start, content, maker, outputs)):
                with suppress(OSError):  # the file stays, and no line names it
                    (self.folder / name).unlink(missing_ok=True)
        self._begun.difference_update(names)

    def drop(self, names: Sequence[str]) -> None:
        """Remove the files of a photo that failed, as far as no line names them."""
        for name in names:
            if name not in self._owners:
                with suppress(OSError):  # the photo has failed already, and the next run tries again
                    (self.folder / name).unlink(missing_ok=True)
            self._begun.discard(name)

    def _wait_for_others(self, notify: Callable[[str], None]) -> None:
        """Wait until no other run writes into the folder; the system unlocks the file when a run ends or is killed."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notify(f"waiting for another run that writes into {name_of(self.folder)}")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            notify(f"{name_of(self.folder)} cannot be locked ({error.strerror}): let no other run write into it")

    def _read(self, notify: Callable[[str], None]) -> None:
        """Read the lines. A torn last line is cut off; damaged lines are reported."""
        damaged = []
        start, text = 0, b"\n"
        with open(self.folder / RESULTS, "rb") as file:
            for number, text in enumerate(file, 1):
                try:
                    line = _parsed(text, start)
                except ValueError:
                    if not text.endswith(b"\n") and _is_beginning(text):
                        os.ftruncate(self._file, start)
                        text = b"\n"
                        break
                    damaged.append(number)
                else:
                    if line is not None:
                        self._remember(line)
                start += len(text)
        if not text.endswith(b"\n"):
            os.write(self._file, b"\n")
        if damaged:
            what = (
                "is damaged and not used"
                if len(damaged) == 1
                else f"and {len(damaged) - 1} more are damaged and not used"
            )
            notify(f"{name_of(self.folder / RESULTS)}: line {damaged[0]} {what}")

    def _remember(self, line: _Line) -> list[str]:
        """Let a line replace earlier lines; return the names of their files that no line names now."""
        if line.command != self.command:
            self._owners.update(dict.fromkeys(line.outputs, line.photo))
            return []
        # The photo has new results, or it was moved, or its file was replaced by another photo's.
        replaced = {line.photo, *(self._owners[name] for name in line.outputs if name in self._owners)}
        earlier = [self._lines.pop(photo) for photo in replaced if photo in self._lines]
        stale = [name for old in earlier for name in old.outputs if name not in line.outputs]
        for name in stale:
            self._owners.pop(name, None)
        self._owners.update(dict.fromkeys(line.outputs, line.photo))
        self._lines[line.photo] = line
        return stale

    def _find_moved(self, photos: Sequence[str]) -> None:
        """Append the lines of photos that were moved once more, with their new paths."""
        gone: dict[str, list[_Line]] = {}
        for line in self._lines.values():
            if not os.path.lexists(line.photo):
                gone.setdefault(os.path.basename(line.photo), []).append(line)
        for photo in photos:
            candidates = [] if photo in self._lines else gone.get(os.path.basename(photo), [])
            with suppress(OSError):  # a photo that cannot be read fails later
                if candidates and os.path.getsize(photo) in {line.content.bytes for line in candidates}:
                    content = content_of(photo)
                    for line in candidates:
                        if line.content == content and line.photo in self._lines:
                            self._move(line, photo)
                            break

    def _move(self, line: _Line, photo: str) -> None:
        with open(self.folder / RESULTS, "rb") as file:
            file.seek(line.start)
            record = json.loads(file.readline())
        start = self._append({**record, "photo": photo})
        self._remember(line._replace(photo=photo, start=start))

    def _append(self, record: Mapping[str, Any]) -> int:
        """Append a line, flush it to the disk, and return its place; a failed write leaves nothing."""
        line = (json.dumps(record) + "\n").encode("ascii")
        end = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, end)
            raise
        return end

    def _remove_unfinished(self) -> None:
        """Remove the files that a killed run had written and that no line names."""
        path = self.folder / PENDING
        if not path.is_file():
            return
        for text in path.read_bytes().splitlines():
            try:
                name = json.loads(text)
            except (ValueError, RecursionError):  # a torn line; its file was not begun
                continue
            if _is_file_name(name) and name not in self._owners:
                (self.folder / name).unlink(missing_ok=True)
        path.unlink()


def names_of_files(stem: str, number: int, endings: Sequence[str]) -> list[str]:
    """Return the names of a photo's files, of at most the length that file systems allow.

    Args:
        stem: the photo's name without its suffix.
        number: tells photos of one name apart, from 1.
        endings: the end of each name.
    """
    mark = "" if number == 1 else f"-{number}"
    longest = max(len(os.fsencode(f"{mark}{ending}")) for ending in endings)
    while len(os.fsencode(stem)) + longest > _LONGEST_NAME:
        stem = stem[:-1]
    return [f"{stem}{mark}{ending}" for ending in endings]


def identity(photo: str | os.PathLike[str]) -> str:
    """Return the path by which results know a photo: absolute, with links to folders resolved, under its own name."""
    folder, name = os.path.split(os.path.abspath(photo))
    return os.path.join(os.path.realpath(folder), name)


def content_of(path: str | os.PathLike[str]) -> Content:
    """Return the size and the SHA-256 of a regular file.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would wait for a writer
        raise OSError(f"{name_of(path)} is not a regular file")
    with open(path, "rb") as file:
        return Content(*file_digest(file))


def model_digest(model: ModelMethods, processor: UperNetImageProcessor) -> str:
    """Return the SHA-256 of a model's weights and configuration and of its image processor.

    It does not depend on the place or the format of the checkpoint. The dtype that the weights were loaded in counts.
    """
    import torch

    def digest(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
        return repr(value)

    state = dict(sorted(model.state_dict().items()))
    with ThreadPoolExecutor() as pool:
        weights = dict(zip(state, pool.map(digest, state.values()), strict=True))
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    described = json.dumps([config, processor.to_dict(), weights], sort_keys=True, default=str)
    return hashlib.sha256(described.encode("ascii")).hexdigest()


def _flushed_content(path: Path) -> Content:
    """Flush a file to the disk, and return its content."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        return Content(*file_digest(file))


def _parsed(text: bytes, start: int) -> _Line | None:
    """Return the line of a photo that has results, None for the line of a photo that failed.

    Raises:
        ValueError: the text is no line.
    """
    try:
        record = json.loads(text)
        if not (isinstance(record["photo"], str) and isinstance(record["command"], str)):
            raise ValueError("the photo or the command has no name")
        if record["error"] is not None:
            return None
        outputs = {name: _typed_content(output) for name, output in record["outputs"].items()}
        if not all(map(_is_file_name, outputs)):
            raise ValueError("an output is outside the folder")
        maker = Maker(record["model"], record["options"])
        return _Line(record["command"], record["photo"], start, _typed_content(record), maker, outputs)
    except (RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ValueError("not a line") from error


def _typed_content(value: Any) -> Content:
    content = Content(value["bytes"], value["sha256"])
    if not (isinstance(content.bytes, int) and isinstance(content.sha256, str)):
        raise TypeError("not a file's content")
    return content


def _is_beginning(text: bytes) -> bool:
    """Return True if text without a line end is the beginning of a line, or nothing but a part of its first field."""
    first = b'{"photo": '
    return text.startswith(first) or first.startswith(text)


def _is_file_name(name: Any) -> bool:
    """Return True for the name of a file inside the folder, which is not the record itself."""
    return (
        isinstance(name, str)
        and name == os.path.basename(name)
        and name not in ("", os.curdir, os.pardir, RESULTS, PENDING)
        and "\0" not in name
    )
