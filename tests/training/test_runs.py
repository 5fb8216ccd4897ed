"""The folder of a run: whole checkpoints, two links, and a log that ends where training resumes."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from fastuper.io.files import atomic_folder
from fastuper.training.checkpoints import STATE, read_state
from fastuper.training.runs import RunFolder


def write(content: str):
    def files(folder):
        (folder / "model.safetensors").write_text(content)
        torch.save({"content": content}, folder / STATE)

    return files


@pytest.fixture
def run(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.prepare()
    return run


def test_folder_appears_when_it_is_complete(tmp_path):
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "a").read_text() == "1"


def test_folder_whose_writer_fails_never_appears(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "new") as folder:
        (folder / "a").write_text((folder / "b").read_text())
    assert list(tmp_path.iterdir()) == []


def test_folder_replaces_no_other(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("0")
    with pytest.raises(OSError), atomic_folder(tmp_path / "old") as folder:  # noqa: PT011
        (folder / "a").write_text("1")
    assert (tmp_path / "old" / "a").read_text() == "0"
    assert len(list(tmp_path.iterdir())) == 1


def test_last_and_best_stay_and_older_ones_go(run):
    run.save(10, 10, write("ten"))
    assert os.path.samefile(run.last, run.best)
    run.save(20, 10, write("twenty"))
    run.save(30, 10, write("thirty"))
    assert (run.last / "model.safetensors").read_text() == "thirty"
    assert (run.best / "model.safetensors").read_text() == "ten"
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [f"step-0000000{step}" for step in (10, 20, 30)]
    # The last two checkpoints have a training state.
    assert list(run.steps()) == [20, 30]
    assert read_state(run.steps()[30]) == {"content": "thirty"}
    run.save(40, 40, write("forty"))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000000030", "step-000000040"]


def test_run_can_be_moved(run, tmp_path):
    run.save(10, None, write("ten"))
    run.path.rename(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "last" / "model.safetensors").read_text() == "ten"


def test_without_links_the_files_are_copied(run, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "a required privilege is not held by the client")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    for step in (10, 20):
        run.save(step, 10, write(str(step)))
    assert not run.last.is_symlink()
    assert [path.name for path in run.last.iterdir()] == ["model.safetensors"]
    assert (run.last / "model.safetensors").read_text() == "20"
    assert (run.best / "model.safetensors").read_text() == "10"
    assert sorted(path.name for path in run.path.iterdir()) == ["best", "checkpoints", "last"]


def test_failed_write_leaves_everything_as_it_was(run):
    run.save(10, 10, write("ten"))

    def full(folder):
        (folder / "model.safetensors").write_text("twe")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        run.save(20, 20, full)
    assert (run.last / "model.safetensors").read_text() == "ten"
    assert (run.best / "model.safetensors").read_text() == "ten"
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000000010"]


def test_links_follow_the_newest_checkpoint_after_a_kill(run):
    """A kill left the newest checkpoint whole, and `last` and `best` at the checkpoint before it."""
    run.save(10, 10, write("ten"))
    with atomic_folder(run.folder(20)) as folder:
        write("twenty")(folder)
    assert list(run.steps()) == [10, 20]
    run.link_and_prune(20, 20)
    assert os.path.samefile(run.last, run.folder(20))
    assert os.path.samefile(run.best, run.folder(20))
    assert list(run.steps()) == [10, 20]


def test_clearing_keeps_files_that_are_not_of_the_run(run):
    run.save(10, 10, write("ten"))
    run.write_log({"step": 10})
    run.tensorboard.mkdir()
    (run.path / "notes.txt").write_text("mine")
    run.clear()
    assert [path.name for path in run.path.iterdir()] == ["notes.txt"]


def test_log_ends_where_training_resumes(run):
    for step in (10, 20, 30):
        run.write_log({"step": step})
    with run.log.open("a") as file:
        file.write('{"step": 1')
    run.truncate_log(20)
    assert run.log.read_text() == '{"step": 10}\n{"step": 20}\n'
    run.truncate_log(0)
    assert run.log.read_text() == ""


def test_damaged_state_is_named(run):
    run.save(10, None, write("ten"))
    (run.folder(10) / STATE).write_bytes(b"PK\x03\x04")
    with pytest.raises(OSError, match=r"step-000000010/training_state\.pt cannot be read"):
        read_state(run.folder(10))


@pytest.mark.parametrize("content", [b"", b"\x80\x04damaged", b"no state at all"])
def test_file_that_is_no_state_is_named(run, content):
    run.save(10, None, write("ten"))
    (run.folder(10) / STATE).write_bytes(content)
    with pytest.raises(OSError, match=r"training_state\.pt cannot be read: .") as raised:
        read_state(run.folder(10))
    assert "\n" not in str(raised.value)


def test_other_folders_stay(run):
    for path in (run.checkpoints / "mine", run.checkpoints / "step-10-copy", run.tensorboard / "mine"):
        path.mkdir(parents=True)
    for step in (10, 20, 30):
        run.save(step, step, write(str(step)))
    others = ["mine", "step-10-copy"]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "mine",
        "step-000000020",
        "step-000000030",
        "step-10-copy",
    ]
    run.clear()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == others
    assert [path.name for path in run.tensorboard.iterdir()] == ["mine"]


def test_lines_of_other_writers_stay_in_the_log(run):
    others = 'a note\n{"loss": 1}\n{"step": "x"}\n[1]\n'
    run.log.write_text(others + '{"step": 30}\n')
    run.truncate_log(20)
    assert run.log.read_text() == others


def test_log_of_another_program_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(ValueError, match="does not belong to a run of fastuper; use another folder"):
        RunFolder(tmp_path).prepare()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 3}\n'


def test_copy_in_a_links_place_is_replaced(run):
    run.save(10, 10, write("ten"))
    run.last.unlink()
    run.last.mkdir()
    run.save(20, 10, write("twenty"))
    assert (run.last / "model.safetensors").read_text() == "twenty"
