"""Runs `fastuper segment` on damaged checkpoints, each in a forked child: `python -m tests.hostile.run FIRST COUNT`.

One process imports PyTorch, because a start takes seconds. A child has 20 s and 2 GB. For each fault a line with the
seed is printed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import fastuper.cli
from fastuper import ConvNextConfig, ResNetConfig, SwinConfig, UperNetConfig, UperNetForSemanticSegmentation
from fastuper.data import UperNetImageProcessor
from fastuper.models.backbones.foreign import transformers_model_types
from tests.hostile.damage import damage

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, out_features=STAGES),
    "resnet": lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=STAGES),
    "swin": lambda: SwinConfig(embed_dim=4, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2, out_features=STAGES),
}
MEMORY = 2 << 30
SECONDS = 20


def make_checkpoints(folder: Path) -> list[Path]:
    """Write a checkpoint of each family in each format: one file, shards with an index, a pickle."""
    made = []
    for name, backbone in BACKBONES.items():
        model = UperNetForSemanticSegmentation(
            UperNetConfig(backbone(), hidden_size=8, auxiliary_channels=4, num_labels=3)
        )
        for kind, options in {
            "single": {},
            "shards": {"max_shard_size": "20KB"},
            "pickle": {"safe_serialization": False},
        }.items():
            place = folder / f"{name}-{kind}"
            model.save_pretrained(place, **options)
            UperNetImageProcessor(size=32).save_pretrained(place)
            made.append(place)
    secret = folder / "secret"
    shutil.copytree(made[0], secret)
    shutil.copy(secret / "model.safetensors", secret / "shard.safetensors")
    return made


def warm_up(models: list[Path], photo: Path, base: Path) -> None:
    """Run the command once for each model: what it imports and compiles need not be repeated in each child."""
    transformers_model_types()
    given = sys.argv
    for model in models:
        sys.argv = [
            "fastuper",
            "segment",
            str(photo),
            "--model",
            str(model),
            "--output",
            str(base / "out" / model.name),
        ]
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None):
            fastuper.cli.main()
    sys.argv = given
    gc.collect()
    gc.freeze()


def child(work: Path, model: Path, photo: Path) -> None:
    """Run the command in this process, with limits, and end the process with the command's status."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    signal.alarm(2 * SECONDS)
    os.chdir(work)
    output = os.open(work / "stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    secret = str(work.parent / "secret")

    def refuse(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            if path.startswith((secret, "/etc/passwd")):
                os.write(2, f"read outside the folder: {path}\n".encode())
                os._exit(99)

    sys.addaudithook(refuse)
    sys.argv = ["fastuper", "segment", str(photo), "--model", str(model), "--output", "out", "--device", "cpu"]
    status = 98
    try:
        fastuper.cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 97
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def fault(status: int, lines: list[str], work: Path) -> str | None:
    """Return what is wrong with the end of a child; None if nothing is."""
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    code = os.WEXITSTATUS(status)
    if code not in (0, 1, 2):
        return f"status {code}"
    if any("Traceback" in line for line in lines):
        return "a traceback"
    if code == 2 and sum(line.startswith("fastuper: ") for line in lines) != 1:
        return "status 2 without one line of the reason"
    if code == 2 and not any(line.count(str(work)) > 1 for line in lines):
        return "no file or folder is named as the cause"
    if any(len(line) > 500 for line in lines):
        return "a line of more than 500 characters"
    return "code of a pickle ran" if (work / "pwned").exists() else None


def main(first: int, count: int) -> int:
    """Damage checkpoints with the seeds from `first`; return the number of faults."""
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", FASTUPER_CHOICES="")
    base = Path(tempfile.mkdtemp())
    photo = base / "photo.png"
    Image.new("RGB", (40, 30), (90, 120, 30)).save(photo)
    torch.manual_seed(0)
    checkpoints = make_checkpoints(base)
    warm_up(checkpoints, photo, base)
    faults, ends = 0, {0: 0, 1: 0, 2: 0}
    for seed in range(first, first + count):
        rng = random.Random(seed)
        work = base / f"work-{seed}"
        shutil.copytree(rng.choice(checkpoints), work / "model")
        done = damage(work / "model", rng)
        start = time.monotonic()
        pid = os.fork()
        if not pid:
            child(work, work / "model", photo)
        _, status, usage = os.wait4(pid, 0)
        lines = (work / "stderr").read_text(errors="replace").splitlines()
        wrong = fault(status, lines, work)
        if wrong:
            faults += 1
            print(f"seed {seed}, {work.name}, {done}: {wrong}: {lines[-3:]}", flush=True)
        elif "-v" in sys.argv:
            took = f"{time.monotonic() - start:.2f} s, {usage.ru_maxrss >> 10} MB"
            print(f"seed {seed}, {done}: {os.WEXITSTATUS(status)}, {took}: {lines[-1:]}", flush=True)
        if not os.WIFSIGNALED(status):
            ends[os.WEXITSTATUS(status)] = ends.get(os.WEXITSTATUS(status), 0) + 1
        shutil.rmtree(work)
    shutil.rmtree(base)
    print(f"{count} damaged checkpoints, {faults} faults; by status {ends}")
    return faults


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]), int(sys.argv[2]))))
