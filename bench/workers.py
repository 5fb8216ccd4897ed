"""Processes that hold a UPerNet each, and run a forward when they are asked: what bench.backbones times.

`bench.backbones` runs in each process again, as all main modules do. This module has the code of the processes, so that
one process imports the libraries and the others are forks of it.
"""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

import fastuper
from bench.machine import one_line
from bench.memory import peak_of
from bench.pairs import images, randomize, uninitialized
from bench.timing import seconds_of
from fastuper.recipes import BACKBONES
from fastuper_kernels.cpu.packs import packed_bytes

CLASSES = 150


def config_of(name: str) -> Any:
    """Return the configuration of the UPerNet over a preset, or over a backbone of timm or Transformers."""
    if name in BACKBONES:
        return fastuper.UperNetConfig(BACKBONES[name](), num_labels=CLASSES)
    library, _, model = name.partition("/")
    if library == "timm":
        return fastuper.UperNetConfig(backbone=model, use_timm_backbone=True, num_labels=CLASSES)
    return fastuper.UperNetConfig(transformers.AutoConfig.for_model(model), num_labels=CLASSES)


def serve(connection: Connection, name: str, size: int, threads: int) -> None:
    """Build a model and send its facts, or {"skipped": reason}; then time a forward for each message."""
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            with uninitialized():
                model = fastuper.UperNetForSemanticSegmentation(config_of(name)).eval()
            randomize(model)
            pixels = images(1, 3, size, size, dtype=torch.float32)
            facts = peak_of(lambda: model(pixels).logits)
    except Exception as error:
        connection.send({"skipped": one_line(error)})
        return
    connection.send(
        {
            "family": model.config.backbone_config.model_type,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **facts,
            "packed": packed_bytes(),
        }
    )
    with torch.inference_mode():
        while connection.recv():
            connection.send(seconds_of(lambda: model(pixels).logits))


class Worker:
    """A process with one model; `facts` are what it sent first."""

    def __init__(self, name: str, size: int):
        context = get_context("forkserver")  # a child is a fork of a process that has imported the libraries
        context.set_forkserver_preload(["bench.workers"])
        self.name = name
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, name, size, torch.get_num_threads()), daemon=True)
        self.process.start()
        other.close()
        try:
            self.facts: dict[str, Any] = self.connection.recv()
        except EOFError:  # the process was killed, for its memory most often
            self.process.join()
            self.facts = {"skipped": f"its process ended with status {self.process.exitcode}"}

    def seconds(self) -> float:
        """Return the seconds of one forward."""
        self.connection.send(True)
        return self.connection.recv()

    def stop(self) -> None:
        """End the process."""
        if "skipped" not in self.facts:
            self.connection.send(False)
        self.process.join()
