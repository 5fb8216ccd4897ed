"""Builds the model or the backbone of a conversion, and writes it as a folder; reports what became of each tensor."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastuper.data.processor import UperNetImageProcessor
from fastuper.io.files import read_json
from fastuper.io.messages import listed, printable
from fastuper.models.backbones import build_backbone
from fastuper.models.backbones.registry import checkpoint_names
from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing
from fastuper.models.pretrained import check_conversion
from fastuper.models.pyramid_configuration import backbone_config_from
from fastuper.models.upernet import UperNetForSemanticSegmentation
from fastuper.weights.conversion import Conversion, Row, Translated
from fastuper.weights.errors import CheckpointError
from fastuper.weights.reading import read_weights
from fastuper.weights.timm import FINAL_NORMS, timm_arguments, to_timm
from fastuper.weights.transformers import OUTPUT_NORMS
from fastuper.weights.writing import as_independent, atomic_weights, split_weights

MODELS: dict[str, Any] = {
    "upernet": UperNetForSemanticSegmentation,
    "unified_perceptual_parsing": UperNetForUnifiedPerceptualParsing,
}
"""The classes of whole models, by `Conversion.kind`."""


@dataclass(frozen=True)
class Converted:
    """A model that was built from a conversion.

    Attributes:
        place: the checkpoint, for messages.
        conversion: the conversion.
        model: the model, or the backbone's module, in evaluation mode.
        processor: the image processor; None if a backbone's checkpoint says nothing about images.
        initial: the names of the model's tensors that got initial values.
    """

    place: str
    conversion: Conversion
    model: nn.Module
    processor: UperNetImageProcessor | None
    initial: Sequence[str]


def build_converted(place: str, conversion: Conversion) -> Converted:
    """Build the model of a conversion and fill it.

    Args:
        place: the checkpoint, for messages.
        conversion: the conversion.

    Raises:
        CheckpointError: a tensor of the model has no value, or shapes disagree.
        ValueError: a value of the configuration is not valid.
    """
    values = dict(conversion.preprocessing)
    processor = UperNetImageProcessor.from_dict(values) if values or conversion.kind != "backbone" else None
    if conversion.kind == "backbone":
        backbone = build_backbone(backbone_config_from(conversion.config))
        initial = check_conversion(backbone, conversion, place)
        backbone.load_state_dict(dict(conversion.tensors), strict=False, assign=True)
        return Converted(place, conversion, backbone.eval(), processor, initial)
    network = MODELS[conversion.kind]
    with torch.device("meta"):
        empty = network(network.config_class.from_dict(dict(conversion.config)))
    initial = check_conversion(empty, conversion, place)
    model = network.from_pretrained(
        None, config=empty.config, state_dict=dict(conversion.tensors), ignore_mismatched_sizes=bool(initial)
    )
    return Converted(place, conversion, model, processor, initial)


def save_converted(converted: Converted, folder: Path) -> None:
    """Write config.json, model.safetensors and, if there is one, preprocessor_config.json into a folder.

    Raises:
        OSError: a file could not be written.
    """
    if isinstance(converted.model, UperNetForSemanticSegmentation | UperNetForUnifiedPerceptualParsing):
        converted.model.save_pretrained(folder)
    else:
        _save_backbone(converted, folder)
    if converted.processor is not None:
        converted.processor.save_pretrained(folder)


def _save_backbone(converted: Converted, folder: Path) -> None:
    """Write a folder that `UperNetConfig(backbone=FOLDER)` and `transformers.AutoBackbone` read."""
    config: Any = copy.deepcopy(converted.model.config)
    tensors = as_independent(dict(converted.conversion.tensors))
    config.architectures = [f"{type(converted.model).__name__}"]
    config.dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
    with atomic_weights(folder, tensors, split_weights(tensors, True, "5GB", None)):
        config.save_pretrained(folder)


def backbone_for_timm(folder: Path) -> tuple[Translated, list[str]]:
    """Return a backbone by timm's names, and lines about it.

    Args:
        folder: a model folder of a UPerNet or of a backbone, ours or Transformers'.

    Raises:
        CheckpointError: the folder has no weights, or other tensors than its configuration's.
        OSError: it has no config.json.
        ValueError: timm has no such backbone.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give a model folder")
    values = read_json(folder / "config.json")
    config = backbone_config_from(values.get("backbone_config") or values)
    tensors, _ = read_weights(folder)
    heads = [name for name in tensors if name.startswith(("decode_head.", "auxiliary_head."))]
    # timm's classifier has a norm after the last map. Without such a norm, only features_only=True can be filled.
    kind = config.model_type
    features_only = kind in FINAL_NORMS and not any(OUTPUT_NORMS in name for name in tensors)
    translated = to_timm(config.to_dict(), tensors, checkpoint_names(kind), features_only)
    own = build_backbone(config).state_dict()
    made = {row.source for row in translated.rows}
    if missing := [n for n in own if n not in made and not checkpoint_names(kind).is_computed(n)]:
        missing = [name for name in missing if not name.startswith(OUTPUT_NORMS)]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of the backbone's tensors, such as {listed(missing, 2)}")
    rows = [*translated.rows, *(Row(name, (), "timm has no heads of a UPerNet") for name in heads)]
    lines = [f"{folder}: the {kind} backbone, by timm's names", *_counts(rows)]
    arguments = timm_arguments(config.to_dict(), features_only)
    lines.append(f"load it by timm.create_model(NAME, {arguments}, checkpoint_path=...), NAME of the same network")
    return Translated(translated.tensors, rows), lines


# Reports --------------------------------------------------------------------------------------------------------------


def summary(converted: Converted) -> list[str]:
    """Return lines about a conversion: counts of tensors, what was left out and chosen, and who can load it."""
    conversion = converted.conversion
    lines = [f"{converted.place}: {conversion.dialect}", *_counts(conversion.rows)]
    if converted.initial:
        verb = "not written" if conversion.kind == "backbone" else "initialised newly"
        lines.append(
            f"{len(converted.initial)} tensors that the source cannot have ({listed(converted.initial, 2)}): {verb}"
        )
    lines += conversion.notes
    if conversion.only_fastuper:
        lines.append(f"Transformers cannot load the folder: {conversion.only_fastuper}")
    return lines


def _counts(rows: Sequence[Row]) -> list[str]:
    """Return lines about the numbers of tensors, and those that were left out."""
    made = [row for row in rows if row.targets]
    changed = sum(1 for row in made if row.note)
    lines = [f"converted {len(made)} of {len(rows)} tensors, {changed} of them with changed values"]
    left_out: dict[str, list[str]] = {}
    for row in rows:
        if not row.targets:
            left_out.setdefault(row.note, []).append(row.source)
    return lines + [f"left out {len(names)} tensors ({listed(names, 2)}): {why}" for why, names in left_out.items()]


def report_text(table: Sequence[Row], initial: Sequence[str], lines: Sequence[str], form: str) -> str:
    """Return a table of all tensors: the source's name, the model's names, and what was changed.

    Args:
        table: a row for each tensor of the source.
        initial: the names of tensors with initial values.
        lines: sentences about the conversion, from `summary` and the verification.
        form: ".csv", ".json", or another suffix for a table of Markdown.
    """
    rows = [(row.source, " ".join(row.targets), _done(row)) for row in table]
    rows += [("", name, "initialised: the source cannot have it") for name in initial]
    head = ("source", "target", "what was done")
    if form == ".json":
        tensors = [{"source": row.source, "targets": list(row.targets), "note": _done(row)} for row in table]
        content = {"notes": list(lines), "tensors": tensors, "initialised": list(initial)}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if form == ".csv":
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([head, *rows])
        return stream.getvalue()
    cells = [[printable(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    lines_of_table = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([*(f"- {printable(line)}" for line in lines), "", *lines_of_table]) + "\n"


def _done(row: Row) -> str:
    return row.note or "copied"
