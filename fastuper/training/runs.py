"""The folder of a training run: checkpoints, the log, and TensorBoard's events.

    RUN/
        checkpoints/step-000002000/   config.json, model.safetensors, preprocessor_config.json; training_state.pt;
                                      validation.json once the checkpoint is validated
        last, best                    links to two checkpoints
        log.jsonl                     a line for each logged step and each validation
        tensorboard/                  the same as curves, and predicted pictures

A checkpoint is written under another name, flushed to the disk and renamed: at any time it exists whole or not at all.
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
VALIDATION = "validation.json"
CHECKPOINT = re.compile(r"step-(\d+)")
TEMPORARY = re.compile(r"\.[0-9a-f]{32}(\.jsonl?)?")
"""Names of files and folders that `atomic_path` and `atomic_folder` leave behind if their process is killed."""


class RunFolder:
    """The checkpoints and the log of a run.

    Args:
        path: the folder; `prepare` makes it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.log = self.path / "log.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.last = self.path / "last"
        self.best = self.path / "best"

    def steps(self) -> dict[int, Path]:
        """Return the checkpoints that training can resume from, by their steps in ascending order."""
        found = {}
        if self.checkpoints.is_dir():
            for folder in self.checkpoints.iterdir():
                match = CHECKPOINT.fullmatch(folder.name)
                if match and (folder / STATE).is_file():
                    found[int(match[1])] = folder
        return dict(sorted(found.items()))

    def folder(self, step: int) -> Path:
        """Return the folder of the checkpoint after this number of steps."""
        return self.checkpoints / f"step-{step:09d}"

    def check_log(self) -> None:
        """Raise ValueError if the folder has another program's log, to which the run would add lines."""
        if self.log.exists() and not self.checkpoints.is_dir():
            raise ValueError(
                f"{self.log} does not belong to a run of fastuper; use another folder, or move the file away"
            )

    def clear(self) -> None:
        """Remove the checkpoints, links, log and events of an earlier run, and no other file."""
        events = self.tensorboard.glob("events.out.tfevents.*")
        for path in (self.last, self.best, self.log, *events, *self._checkpoint_folders()):
            _remove(path)
        for folder in (self.tensorboard, self.checkpoints):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def prepare(self) -> None:
        """Make the folder, and remove temporary files of killed processes from it."""
        self.check_log()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for path in [*self.checkpoints.iterdir(), *self.checkpoints.glob("step-*/*"), *self.path.iterdir()]:
            if TEMPORARY.fullmatch(path.name):
                _remove(path)

    def save(self, step: int, best_step: int | None, write: Callable[[Path], None]) -> None:
        """Add a checkpoint, and remove the checkpoints that are neither the last nor the best.

        Args:
            step: the number of steps that are done.
            best_step: the step of the best validation; None before the first.
            write: writes the files of the checkpoint into the empty folder that it is called with.

        Raises:
            OSError: the checkpoint could not be written; the older checkpoints are unchanged.
        """
        folder = self.folder(step)
        _remove(folder)  # an earlier best checkpoint without its training state, whose step is reached again
        with atomic_folder(folder) as temporary:
            write(temporary)
        self.link_and_prune(step, best_step)

    def link_and_prune(self, step: int, best_step: int | None) -> None:
        """Link `last` and `best` to the checkpoints of these steps, and remove all other checkpoints.

        A run that was killed between writing a checkpoint and this call makes the call when it resumes.
        """
        if best_step is not None and self.folder(best_step).is_dir():
            _link(self.best, self.folder(best_step))
        _link(self.last, self.folder(step))
        for folder in self._checkpoint_folders():
            if folder == self.folder(best_step or step) and folder != self.folder(step):
                (folder / STATE).unlink(missing_ok=True)  # only its weights are needed: training resumes from the last
            elif folder != self.folder(step):
                _remove(folder)

    def _checkpoint_folders(self) -> list[Path]:
        """Return the folders of checkpoints; folders of other names are not the run's."""
        if not self.checkpoints.is_dir():
            return []
        return [path for path in self.checkpoints.iterdir() if CHECKPOINT.fullmatch(path.name) and path.is_dir()]

    def write_validation(self, step: int, best: dict[str, Any] | None) -> None:
        """Record beside a checkpoint that it is validated, with the step and mIoU of the best checkpoint so far."""
        with atomic_path(self.folder(step) / VALIDATION) as temporary:
            temporary.write_text(json.dumps(best), encoding="utf-8")

    def read_validation(self, step: int) -> tuple[bool, dict[str, Any] | None]:
        """Return True if a checkpoint is validated, and the step and mIoU of the best checkpoint then."""
        try:
            return True, json.loads((self.folder(step) / VALIDATION).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False, None

    def truncate_log(self, step: int, validated: bool = True) -> None:
        """Remove the log's lines about later steps, and a line that a killed process left unfinished.

        Args:
            step: the last step that stays in the log.
            validated: whether the line of that step's validation stays; False if the validation was not finished.
        """
        if not self.log.is_file():
            return
        lines = self.log.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and not _is_later(line, step, validated)]
        if kept == lines:
            return
        with atomic_path(self.log) as temporary:
            temporary.write_bytes(b"".join(kept))

    def write_log(self, values: dict[str, Any]) -> None:
        """Add a line to the log.

        Raises:
            OSError: the line cannot be written; the message names the log.
        """
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise OSError(f"{self.log} cannot be written: {error.strerror}") from None


def read_state(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's training state, onto the CPU.

    Raises:
        OSError: the file cannot be read; the message names it.
    """
    path = folder / STATE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise OSError(f"{path} cannot be read: {reason(error)}") from None


def _is_later(line: bytes, step: int, validated: bool) -> bool:
    """Return True if a line of the log is about a later event than a step; False for lines of another writer."""
    try:
        values = json.loads(line)
        return bool(values["step"] > step or (values["step"] == step and "mIoU" in values and not validated))
    except (ValueError, LookupError, TypeError):
        return False


def _link(link: Path, folder: Path) -> None:
    """Make a link to another folder, atomically.

    If the system has no links (Windows, for users without the permission) the folder is copied. Then the name is
    missing for an instant.
    """
    temporary = link.with_name(f".{uuid.uuid4().hex}")
    try:
        temporary.symlink_to(Path(folder.parent.name) / folder.name, target_is_directory=True)
    except (OSError, NotImplementedError):
        with atomic_folder(temporary) as copied:
            for file in folder.iterdir():
                if file.name != STATE:
                    shutil.copy2(file, copied / file.name)
    if link.is_dir() and not link.is_symlink():  # a copy: of this system, or of the system that the run was moved from
        _remove(link)
    os.replace(temporary, link)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists; a folder loses its name before its files."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        hidden = path.with_name(f".{uuid.uuid4().hex}")
        os.rename(path, hidden)
        shutil.rmtree(hidden)
