"""The folder of a training run: checkpoints, the log, and TensorBoard's events.

    RUN/
        checkpoints/step-000002000/   config.json, model.safetensors, preprocessor_config.json; training_state.pt;
                                      checksums.json; validation.json once the checkpoint is validated
        last, best                    links to two checkpoints
        log.jsonl                     a line for each logged step and each validation
        tensorboard/                  the same as curves, and predicted pictures
        .fastuper-lock.json           while a training runs: its process

A checkpoint is written under another name, flushed to the disk and renamed: at any time it exists whole or not at all.
Training resumes from the last checkpoint that its checksums find intact; the checkpoint before the last is kept for it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastuper.io.files import atomic_folder
from fastuper.training.checkpoints import CHECKSUMS, STATE, find_damage, write_checksums
from fastuper.training.config import TrainingError
from fastuper.training.lock import RunLock
from fastuper_kernels.dispatch.files import atomic_path, remove_orphans, temporary_beside

VALIDATION = "validation.json"
CHECKPOINT = re.compile(r"step-(\d+)")


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
        self.lock = RunLock(self.path / ".fastuper-lock.json")

    def steps(self) -> dict[int, Path]:
        """Return the checkpoints with a training state, by their steps in ascending order."""
        return {step: folder for step, folder in self._all_steps().items() if (folder / STATE).is_file()}

    def _all_steps(self) -> dict[int, Path]:
        return dict(sorted((int(folder.name.removeprefix("step-")), folder) for folder in self._checkpoint_folders()))

    def newest_intact(self) -> tuple[int | None, list[str]]:
        """Return the step of the newest checkpoint that is intact, and a line about each newer one that is damaged.

        The step is None if there is no checkpoint.

        Raises:
            TrainingError: there are checkpoints, but training can resume from none of them.
        """
        damage: list[str] = []
        for step, folder in reversed(self._all_steps().items()):
            why = find_damage(folder)
            if why is None:
                return step, damage
            damage.append(f"the checkpoint {folder} is damaged ({why})")
        if damage:
            raise TrainingError(
                f"{'; '.join(damage)}; restore one of them, or give another folder, or --restart (restart=True) to "
                "remove the run"
            )
        return None, []

    def folder(self, step: int) -> Path:
        """Return the folder of the checkpoint after this number of steps."""
        return self.checkpoints / f"step-{step:09d}"

    def check_log(self) -> None:
        """Raise ValueError if the folder has another program's log, to which the run would add lines."""
        if os.path.lexists(self.log) and not self.log.is_file():
            raise ValueError(f"{self.log} is not a file; use another folder, or move it away")
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
        """Remove temporary files of killed processes from the folder, and make the folder of the checkpoints.

        Raises:
            OSError: the folder cannot be written; the message names it.
        """
        self.check_log()
        _make_folder(self.checkpoints)
        for folder in (self.path, self.checkpoints, *self._checkpoint_folders()):
            remove_orphans(folder)

    def take(self) -> None:
        """Make the folder, and take its lock.

        Raises:
            TrainingError: another training has the lock; the message names its process.
            OSError: the folder cannot be written; the message names it.
        """
        self.check_log()
        _make_folder(self.path)
        self.lock.acquire()

    def save(self, step: int, best_step: int | None, write: Callable[[Path], None]) -> None:
        """Add a checkpoint, and remove the checkpoints that are not the last two or the best.

        Args:
            step: the number of steps that are done.
            best_step: the step of the best validation; None before the first.
            write: writes the files of the checkpoint into the empty folder that it is called with.

        Raises:
            OSError: the checkpoint could not be written; the older checkpoints are unchanged.
            TrainingError: another training took the folder.
        """
        self.lock.check()
        folder = self.folder(step)
        _remove(folder)  # an earlier best checkpoint without its training state, whose step is reached again
        with atomic_folder(folder) as temporary:
            write(temporary)
            write_checksums(temporary)
        self.link_and_prune(step, best_step)

    def link_and_prune(self, step: int, best_step: int | None, keep_newer: bool = False) -> None:
        """Link `last` and `best` to the checkpoints of these steps, and remove the others but the one before `step`.

        A run that was killed between writing a checkpoint and this call makes the call when it resumes.

        Args:
            step: the step of the last checkpoint.
            best_step: the step of the best validation; None before the first.
            keep_newer: whether checkpoints after `step` stay: they are damaged, and nothing replaces them yet.
        """
        if best_step is not None and self.folder(best_step).is_dir():
            _link(self.best, self.folder(best_step))
        _link(self.last, self.folder(step))
        before = max((older for older in self.steps() if older < step), default=step)
        for other, folder in self._all_steps().items():
            if other in (step, before) or (keep_newer and other > step):
                continue
            if other == best_step:
                (folder / STATE).unlink(missing_ok=True)  # only its weights are needed: training resumes from the last
            else:
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
        """Return True if a checkpoint is validated, and the step and mIoU of the best checkpoint then.

        A file that cannot be read, or holds anything else, counts as none: the checkpoint is validated again.
        """
        try:
            best = json.loads((self.folder(step) / VALIDATION).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False, None
        if best is None or is_best(best):
            return True, best
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
            TrainingError: another training took the folder.
        """
        self.lock.check()
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise OSError(f"{self.log} cannot be written: {error.strerror}") from None


def is_best(value: Any) -> bool:
    """Return True if a value names the step and the mIoU of a best checkpoint."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("step"), int)
        and isinstance(value.get("mIoU"), float | int)
        and value.keys() == {"step", "mIoU"}
    )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror
        if isinstance(error, FileExistsError):
            why = "a link of this name leads to no folder" if path.is_symlink() else "a file has this name"
        raise OSError(f"cannot make the folder {path}: {why}") from None


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
    temporary = temporary_beside(link)
    try:
        temporary.symlink_to(Path(folder.parent.name) / folder.name, target_is_directory=True)
    except (OSError, NotImplementedError):
        with atomic_folder(temporary) as copied:
            for file in folder.iterdir():
                if file.name not in (STATE, CHECKSUMS):
                    shutil.copy2(file, copied / file.name)
    if link.is_dir() and not link.is_symlink():  # a copy: of this system, or of the system that the run was moved from
        _remove(link)
    os.replace(temporary, link)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists; a folder loses its name before its files."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        hidden = temporary_beside(path)
        os.rename(path, hidden)
        shutil.rmtree(hidden)
