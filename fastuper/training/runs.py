"""The folder of a training run: checkpoints that are whole whenever one looks, the log, TensorBoard's events.

    RUN/
        checkpoints/step-000002000/   config.json, model.safetensors, preprocessor_config.json; training_state.pt;
                                      validation.json once it was validated
        last, best                    links to two of them
        log.jsonl                     a line for each logged step and each validation
        tensorboard/                  the same as curves, and predicted pictures

A checkpoint is written under another name, flushed to the disk and renamed: it is there as a whole or not at all.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastuper.io.files import atomic_folder
from fastuper.io.messages import reason
from fastuper_kernels.dispatch.files import atomic_path

STATE = "training_state.pt"
BEST = "validation.json"
CHECKPOINT = re.compile(r"step-(\d+)")


class RunFolder:
    """A run's checkpoints and log.

    Args:
        path: the folder; made when the first thing is written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.log = self.path / "log.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.last = self.path / "last"
        self.best = self.path / "best"

    def steps(self) -> dict[int, Path]:
        """Return the checkpoints that training can go on from, by their step, in its order."""
        found = {}
        if self.checkpoints.is_dir():
            for folder in self.checkpoints.iterdir():
                match = CHECKPOINT.fullmatch(folder.name)
                if match and (folder / STATE).is_file():
                    found[int(match[1])] = folder
        return dict(sorted(found.items()))

    def clear(self) -> None:
        """Remove what an earlier run left, and nothing else: its checkpoints, links, log and events."""
        for path in (self.last, self.best, self.log, *self.tensorboard.glob("events.out.tfevents.*"), *self._written()):
            _remove(path)
        for folder in (self.tensorboard, self.checkpoints):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def make(self) -> None:
        """Make the folder, and clear what writers that were killed left in it."""
        self.check()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for path in [*self.checkpoints.iterdir(), *self.checkpoints.glob("step-*/*"), *self.path.iterdir()]:
            if re.fullmatch(r"\.[0-9a-f]{32}(\.jsonl?)?", path.name):
                _remove(path)

    def check(self) -> None:
        """Raise ValueError where the folder has somebody else's log, which would be written into."""
        if self.log.exists() and not self.checkpoints.is_dir():
            raise ValueError(f"{self.log} is of no run of fastuper's; take another folder, or take the file away")

    def save(self, step: int, best_step: int | None, write: Callable[[Path], None]) -> None:
        """Add a checkpoint.

        Args:
            step: the number of steps that were done.
            best_step: see `settle`.
            write: called with an empty folder, writes the files into it.

        Raises:
            OSError: it could not be written; the older ones are as they were.
        """
        folder = self.folder(step)
        _remove(folder)  # one that has lost its training state: an older run's best, gone past once more
        with atomic_folder(folder) as temporary:
            write(temporary)
        self.settle(step, best_step)

    def settle(self, step: int, best_step: int | None) -> None:
        """Let `last` and `best` mean the checkpoints of these steps, and remove all others.

        A run that was killed after it wrote a checkpoint, and before this was done, has it done when it goes on.
        """
        if best_step is not None and self.folder(best_step).is_dir():
            _point(self.best, self.folder(best_step))
        _point(self.last, self.folder(step))
        for folder in self._written():
            if folder == self.folder(best_step or step) and folder != self.folder(step):
                (folder / STATE).unlink(missing_ok=True)  # it stays for its weights: training goes on from the last
            elif folder != self.folder(step):
                _remove(folder)

    def _written(self) -> list[Path]:
        """Return the folders that checkpoints are in; others in that place are not ours."""
        if not self.checkpoints.is_dir():
            return []
        return [path for path in self.checkpoints.iterdir() if CHECKPOINT.fullmatch(path.name) and path.is_dir()]

    def write_best(self, step: int, best: dict[str, Any] | None) -> None:
        """Note beside a checkpoint that it was validated, and which one is the best since."""
        with atomic_path(self.folder(step) / BEST) as temporary:
            temporary.write_text(json.dumps(best), encoding="utf-8")

    def read_best(self, step: int) -> tuple[bool, dict[str, Any] | None]:
        """Return whether a checkpoint was validated, and which one is the best since."""
        try:
            return True, json.loads((self.folder(step) / BEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False, None

    def folder(self, step: int) -> Path:
        """Return the folder of the checkpoint after this many steps."""
        return self.checkpoints / f"step-{step:09d}"

    def truncate_log(self, step: int, validated: bool = True) -> None:
        """Drop the log's lines about later steps, and a line that a killed process left unfinished.

        Args:
            step: the last one that is kept.
            validated: whether the line of its validation is kept; it is not where that was not finished.
        """
        if not self.log.is_file():
            return
        lines = self.log.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and not _is_late(line, step, validated)]
        if kept == lines:
            return
        with atomic_path(self.log) as temporary:
            temporary.write_bytes(b"".join(kept))

    def write_log(self, values: dict[str, Any]) -> None:
        """Add a line to the log; the error names it."""
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise OSError(f"{self.log} cannot be written: {error.strerror}") from None


def read_state(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's training state, onto the CPU; the error names the file."""
    path = folder / STATE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise OSError(f"{path} cannot be read: {reason(error)}") from None


def _is_late(line: bytes, step: int, validated: bool) -> bool:
    """Return whether a line of the log is about what comes after a step; one that is not ours is not."""
    try:
        values = json.loads(line)
        return bool(values["step"] > step or (values["step"] == step and "mIoU" in values and not validated))
    except (ValueError, LookupError, TypeError):
        return False


def _point(link: Path, folder: Path) -> None:
    """Let a link mean another folder, from one moment to the next.

    Where the system has no links (Windows, for those who may not make them) the folder is copied, and for an instant
    there is none.
    """
    temporary = link.with_name(f".{uuid.uuid4().hex}")
    try:
        temporary.symlink_to(Path(folder.parent.name) / folder.name, target_is_directory=True)
    except (OSError, NotImplementedError):
        with atomic_folder(temporary) as copied:
            for file in folder.iterdir():
                if file.name != STATE:
                    shutil.copy2(file, copied / file.name)
    if link.is_dir() and not link.is_symlink():  # a copy, of this system or of the one that the run came from
        _remove(link)
    os.replace(temporary, link)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there; of a folder, the name goes first."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        hidden = path.with_name(f".{uuid.uuid4().hex}")
        os.rename(path, hidden)
        shutil.rmtree(hidden)
