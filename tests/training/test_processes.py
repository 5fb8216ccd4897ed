"""Training in other processes: a process that is killed at any instant, and two processes that train together."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastuper import UperNetForSemanticSegmentation
from tests.training.common import Photos, losses, read_log, tiny_model, tiny_processor, train, write_data

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, which saves the import of torch")
KILLS = 2
ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])


class RecordedPhotos(Photos):
    """Photos that write the index of each image that is read to a file, one write an index."""

    def __init__(self, count: int, notes: Path):
        super().__init__(count)
        self.notes = notes

    def __getitem__(self, index: int):
        with self.notes.open("ab", buffering=0) as file:
            file.write(b"%d\n" % index)
        return super().__getitem__(index)


def run(output: Path, steps: int = 20) -> None:
    torch.set_num_threads(1)
    train(
        output,
        model=tiny_model(0.5),
        data=RecordedPhotos(5, output.with_suffix(".notes")),
        validation=Photos(1, seed=1),
        steps=steps,
        batch_size=2,
        ema=0.9,
        save_every=2,
        validate_every=7,
    )


def forked(function, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def in_fresh_process(function, tmp_path: Path) -> None:
    """Call a function of this file in a new process: a process that has computed gradients must not be forked."""
    code = f"from pathlib import Path; from {__name__} import *; {function.__name__}(Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_killed_run_goes_on_with_the_same_images_and_losses(tmp_path):
    in_fresh_process(check_killed_run, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Gloo after a fork")
def test_two_processes_have_the_losses_of_one(tmp_path):
    in_fresh_process(check_two_processes, tmp_path)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "-m"],
}


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="Gloo")
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_the_command_under_a_launcher(launcher, tmp_path):
    """Two processes of the command have the losses of one process, and end with the same status."""
    data, start = write_data(tmp_path / "data"), tmp_path / "start"
    tiny_model().save_pretrained(start)
    tiny_processor().save_pretrained(start)
    options = ["train", "--data", data, "--model", start, "--steps", 3, "--batch-size", 2, "--crop", 32, "--lr", 0.01]
    options += ["--log-every", 1, "--workers", 0, "--freeze-norm", "--cpu"]

    def run(how, output):
        return subprocess.run(
            [sys.executable, "-m", *how, "fastuper", *map(str, options), "--output", str(output)],
            env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    for how, name in (([], "one"), (launcher, "two")):
        done = run(how, tmp_path / name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("4 photos to train on") == 1, "only one process prints"
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert len(losses(tmp_path / "two")) == 3
    assert read_log(tmp_path / "two")[-1] == pytest.approx(read_log(tmp_path / "one")[-1])

    photo = data / "images" / "training" / "2.png"
    photo.write_bytes(photo.read_bytes()[:99])
    done = run(launcher, tmp_path / "broken")
    assert done.returncode != 0
    assert f"{photo}" in done.stdout + done.stderr


def check_killed_run(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = forked(run, whole)
    while process.is_alive() and not read_whole(whole):
        time.sleep(0.002)
    begin = time.monotonic()
    process.join()
    assert process.exitcode == 0
    line = (time.monotonic() - begin) / len(read_whole(whole))  # seconds for a line of the log
    seed = random.randrange(2**32)
    print("kills at instants of seed", seed)
    instants = random.Random(seed)
    starts = []
    for part in range(1, KILLS + 1):
        notes = parts.with_suffix(".notes")
        starts.append(notes.stat().st_size if notes.exists() else 0)
        process = forked(run, parts)
        # After some steps more; then at any instant of a step, or of writing a checkpoint.
        while (process.is_alive() and not (parts / "log.jsonl").is_file()) or len(read_whole(parts)) < 8 * part - 3:
            assert process.is_alive() or process.exitcode == 0
            time.sleep(0.002)
        # Before the run ends: at least seven lines are missing.
        time.sleep(instants.random() * min(0.3, 4 * line))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    starts.append(parts.with_suffix(".notes").stat().st_size)
    process = forked(run, parts)
    process.join()
    assert process.exitcode == 0

    assert read_log(parts) == read_log(whole)
    saved = [UperNetForSemanticSegmentation.from_pretrained(folder / "last").state_dict() for folder in (whole, parts)]
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    assert sorted(path.name for path in parts.iterdir()) == sorted(path.name for path in whole.iterdir())
    order = whole.with_suffix(".notes").read_bytes().split()
    read = parts.with_suffix(".notes").read_bytes()
    for start, end in zip(starts, [*starts[1:], len(read)], strict=True):
        part = read[start:end].split()
        assert len(part) < len(order) or start == 0
        assert any(part == order[at : at + len(part)] for at in range(0, len(order), 2)), "images out of order"


def read_whole(run: Path) -> list[bytes]:
    """Return the lines of a log that another process is writing."""
    try:
        return (run / "log.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []


def train_together(output: Path) -> None:
    """Train as one of two processes; in most steps the second has the images with more ignored pixels."""
    torch.set_num_threads(1)
    train(output, double=True, freeze_norm=True, accumulate=2, clip=0.5, validation=Photos(3, seed=1), steps=3)


def check_two_processes(tmp_path: Path) -> None:
    from accelerate import debug_launcher

    debug_launcher(train_together, (tmp_path / "two",))  # first: forked processes inherit the state of this process
    train(tmp_path / "one", double=True, freeze_norm=True, clip=0.5, validation=Photos(3, seed=1), steps=3)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-10)
    assert len(losses(tmp_path / "two")) == 3
    one, two = (
        UperNetForSemanticSegmentation.from_pretrained(tmp_path / name / "last").state_dict() for name in ("one", "two")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-9)
    score = [line["mIoU"] for line in read_log(tmp_path / "two") if "mIoU" in line]
    assert score[-1] == [line["mIoU"] for line in read_log(tmp_path / "one") if "mIoU" in line][-1]
