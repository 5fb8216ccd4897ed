"""The settings that decide the losses of a run: saved with its checkpoints, and compared when the run resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastuper.data.augment import TrainingDataset
from fastuper.data.folders import FolderDataset
from fastuper.data.processor import UperNetImageProcessor
from fastuper.models.upernet_configuration import UperNetConfig
from fastuper.training.config import MAY_CHANGE_ON_RESUME, Plan, TrainingConfig


def loss_settings(
    config: TrainingConfig,
    plan: Plan,
    model: UperNetConfig,
    processor: UperNetImageProcessor,
    train_data: TrainingDataset,
) -> dict[str, Any]:
    """Return the settings that decide the losses of a run, as JSON values.

    The names of the images count, not their pixels; the configuration of the model counts, not its weights.
    """
    options = dataclasses.asdict(config) | dataclasses.asdict(plan.recipe) | {"warmup_steps": plan.warmup_steps}
    attributes = getattr(train_data.transform, "__dict__", {})
    settings: dict[str, Any] = {
        **{name: value for name, value in options.items() if name not in MAY_CHANGE_ON_RESUME},
        **{name: value for name, value in attributes.items() if not name.startswith("_") and _is_json(value)},
        "images": len(train_data),
        "model": {k: v for k, v in model.to_dict().items() if k not in ("_name_or_path", "architectures")},
        "processor": processor.to_dict(),
    }
    if isinstance(train_data.samples, FolderDataset):
        settings["images' names"] = _digest_of_names([photo for photo, _ in train_data.samples.files])
    return json.loads(json.dumps(settings, default=str))


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the settings that differ, each with both values, as text; an empty string if all are equal."""
    before, now = _flat(before), _flat(now)
    names = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    return ", ".join(f"{name} was {before.get(name)} and is now {now.get(name)}" for name in names)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without nesting: model settings are named `model.NAME`, processor settings `processor.NAME`."""
    flat = dict(settings)
    for part in ("model", "processor"):
        flat |= {f"{part}.{name}": value for name, value in flat.pop(part, {}).items()}
    return flat


def _digest_of_names(files: Sequence[Path]) -> str:
    """Return a digest of the files' names, which does not change if their folder moves."""
    above = Path(os.path.commonpath([file.parent for file in files])).parent
    names = "\n".join(Path(os.path.relpath(file, above)).as_posix() for file in files)
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _is_json(value: Any) -> bool:
    """Return True if JSON can represent a value; the text of other objects has their address, new in each process."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
