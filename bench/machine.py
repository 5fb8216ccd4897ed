"""Describes where a result comes from: the machine under a readable name, the libraries' versions, commit and date."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# Virtual machines often hide the processor's name. The family and model number still identify the generation.
GENERATIONS = [
    ("AuthenticAMD", 25, range(0x00, 0x10), "zen3"),
    ("AuthenticAMD", 25, range(0x10, 0x20), "zen4"),
    ("AuthenticAMD", 25, range(0xA0, 0xB0), "zen4"),
    ("AuthenticAMD", 26, range(0x00, 0x100), "zen5"),
    ("GenuineIntel", 6, range(0x8F, 0x90), "sapphire-rapids"),
    ("GenuineIntel", 6, range(0xCF, 0xD0), "emerald-rapids"),
    ("GenuineIntel", 6, range(0x6A, 0x6D), "ice-lake"),
]
ABSENT = "not installed"
PACKAGES = ["transformers", "timm", "segmentation_models_pytorch", "onnx", "onnxscript", "onnxruntime", "openvino"]


def without_paths(text: str) -> str:
    """Return the text in one line. Words with a slash, which may be paths of this machine, become "..."."""
    return " ".join("..." if "/" in word else word for word in text.split())


def one_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message, without paths."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return without_paths(text)[:200]


def processor() -> dict[str, str]:
    """Return the first processor's entries of /proc/cpuinfo; an empty dict if the file does not exist."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def machine_name() -> str:
    """Return the name of the results file, such as amd-epyc-zen4-2-threads; FASTUPER_MACHINE overrides it."""
    if name := os.environ.get("FASTUPER_MACHINE"):
        return name
    cpu = processor()
    model = cpu.get("model name") or platform.processor() or platform.machine()
    model = re.sub(r"\(R\)|\(TM\)|\bCPU\b|\bProcessor\b|\d+-Core|@.*", " ", model)
    parts = [re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")]
    for vendor, family, models, generation in GENERATIONS:
        if cpu.get("vendor_id") == vendor and int(cpu["cpu family"]) == family and int(cpu["model"]) in models:
            parts.append(generation)
    return "-".join([*parts, str(torch.get_num_threads()), "threads"])


def machine() -> dict[str, Any]:
    """Return the machine's processor, threads and memory; nothing identifies the single machine."""
    cpu = processor()
    return {
        "name": machine_name(),
        "cpu": cpu.get("model name", platform.processor()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": "avx512_bf16" in cpu.get("flags", ""),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, PyTorch and the peers' packages."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ABSENT
    return found


def commit() -> str:
    """Return the commit that is measured, with "-dirty" if files differ from it; "unknown" without git."""
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return "unknown"
    return done.stdout.strip() or "unknown"


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
