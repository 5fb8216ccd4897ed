"""The list of dialects, and `convert_source`: recognises a checkpoint, converts it, and accounts for every tensor."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastuper.io.messages import listed, shown
from fastuper.weights import authors, mmseg, official, smp, timm
from fastuper.weights.checkpoints import read_source
from fastuper.weights.conversion import Choices, Conversion, Dialect, Source
from fastuper.weights.dialects import library_of
from fastuper.weights.errors import CheckpointError

DIALECTS: list[Dialect] = [official.DIALECT, mmseg.DIALECT, smp.DIALECT, *authors.CLASSIFIERS, *timm.DIALECTS]
"""The kinds of checkpoints that can be converted; the first that recognises a source converts it."""

OTHER_NETWORKS = (
    (r"(decode_head|sem_seg_head)\.(pixel_decoder|transformer_decoder|predictor)\.", "Mask2Former or MaskFormer"),
    (r"(pixel_level_module|transformer_module|class_predictor)\.", "Mask2Former or MaskFormer of Transformers"),
    (r"decode_head\.(c1_bottleneck|sep_bottleneck)\.", "DeepLab V3+"),
    (r"decode_head\.(aspp_modules|image_pool)\.", "DeepLab V3 (ASPP)"),
    (r"decode_head\.linear_(c\d|fuse)\.|segformer\.|backbone\.block\d\.\d+\.attn\.(q|kv)\.", "SegFormer"),
    (r"decode_head\.fusion_conv\.", "SegFormer (its head)"),
    (r"decode_head\.(object_context_block|spatial_gather)|decode_head\.\d+\.object_context_block", "OCRNet"),
    (r"decode_head\.up_convs\.|neck\.mla\.", "SETR"),
    (r"decode_head\.scale_heads\.", "Semantic FPN"),
    (r"decode_head\.(pam|cam)_", "DANet"),
    (r"decode_head\.enc_module\.", "EncNet"),
    (
        r"decode_head\.(nl_block|gc_block|dnl_block|cca)\.",
        "a network of attention over all cells (NonLocal, GCNet, CCNet)",
    ),
    (r"decode_head\.(psa|context_blocks|dec_\w+|ham)\b", "another network of mmsegmentation"),
    (r"decode_head\.(blocks|mask_norm|cls_emb)\b", "Segmenter"),
    (r"(rpn_head|bbox_head|roi_head|mask_head)\.", "a detector of mmdetection"),
    (r"decoder\.(aspp|block[12])\.", "DeepLab of segmentation_models_pytorch"),
    (r"decoder\.(blocks\.\d+\.conv1|blocks\.x_\d)", "Unet of segmentation_models_pytorch"),
    (r"aux_classifier\.|classifier\.\d\.convs\.", "a network of torchvision"),
)
"""Beginnings of names that only another network's checkpoints have, and the network."""

OURS = re.compile(
    r"(decode_head|auxiliary_head)\.classifier\.|backbone\.embeddings\.|(embeddings|encoder\.(stages|layers))\."
)


def read_converted(source: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Conversion:
    """Read and convert a checkpoint of another library.

    Args:
        source: a file or a folder; see `read_source`.
        options: values by their names in `OPTIONS`, and `weights_key`; what the checkpoint does not say.

    Raises:
        CheckpointError: it cannot be read or converted.
        ValueError: an option is unknown or contradicts the checkpoint.
        OSError: there is no such file or folder.
    """
    options = dict(options or {})
    weights_key = options.pop("weights_key", None)
    choices = Choices(options)  # before the file is read: an unknown option is the caller's fault
    return convert_source(read_source(source, weights_key), choices)


def convert_source(source: Source, choices: Choices) -> Conversion:
    """Convert a checkpoint by the first dialect that recognises it.

    Args:
        source: the checkpoint.
        choices: the caller's options.

    Returns:
        The conversion, with a row for each tensor of the source; `notes` also has those of the source and choices.

    Raises:
        CheckpointError: no dialect recognises the source (the message names its network), or a tensor does not fit.
        ValueError: an option contradicts the checkpoint, or the dialect has no use for it.
    """
    if (network := _other_network(source)) is not None:
        raise CheckpointError(f"{source.place} is a checkpoint of {network}, not of a UPerNet here; {_known()}")
    for dialect in DIALECTS:
        if dialect.recognises(source):
            break
    else:
        raise CheckpointError(f"{source.place} {_unknown(source)}; {_known()}")
    try:
        conversion = dialect.convert(source, choices)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(
            f"{source.place} has names of {dialect.name}, but its tensors or its configuration are not of that form "
            f"({type(error).__name__}: {error})"
        ) from error
    if unused := choices.unused():
        raise ValueError(f"{conversion.dialect} has no use for {listed(unused, 8)}; leave it out")
    rows = [*conversion.rows, *source.left_out]
    _account(source, conversion)
    notes = tuple(dict.fromkeys((*source.notes, *conversion.notes, *choices.notes)))
    return replace(conversion, rows=rows, notes=notes, library=dialect.library)


def _account(source: Source, conversion: Conversion) -> None:
    """Check that each tensor of the source has one row, and that the rows make the converted tensors."""
    counts = Counter(row.source for row in conversion.rows)
    wrong = [name for name in source.tensors if counts[name] != 1] + [n for n in counts if n not in source.tensors]
    if wrong:
        raise CheckpointError(f"{source.place}: {len(wrong)} tensors are not accounted for, such as {listed(wrong, 2)}")
    targets = Counter(target for row in conversion.rows for target in row.targets)
    wrong = [name for name, count in targets.items() if count != 1 or name not in conversion.tensors]
    wrong += [name for name in conversion.tensors if name not in targets]
    if wrong:
        raise CheckpointError(f"{source.place}: {len(wrong)} tensors come from nowhere, such as {listed(wrong, 2)}")


def check_filled(
    place: str, conversion: Conversion, own: Mapping[str, Sequence[int]], computed: Collection[str] = ()
) -> list[str]:
    """Check that a conversion fills a model: each tensor of the model has a value of the same shape.

    Args:
        place: the checkpoint, for messages.
        conversion: the conversion.
        own: the shape of each tensor of the model, by its name.
        computed: names of the model's tensors that follow from its configuration.

    Returns:
        The names of the tensors that get initial values, because the source cannot have them.

    Raises:
        CheckpointError: tensors are missing or too many, or shapes disagree; the message names them.
    """
    tensors = conversion.tensors
    absent = [name for name in own if name not in tensors]
    # Files of PyTorch before 0.4.1 lack the counters of BatchNorm, which no result depends on.
    initial = [n for n in absent if n.startswith(conversion.initialised) or n.endswith("num_batches_tracked")]
    if missing := [name for name in absent if name not in initial and name not in computed]:
        raise CheckpointError(
            f"{place} lacks {len(missing)} of the model's {len(own)} tensors, such as {listed(missing, 2)}; it is "
            "incomplete, or of another network"
        )
    if extra := [name for name in tensors if name not in own]:
        raise CheckpointError(
            f"{place} has {len(extra)} tensors that the model has no place for, such as {listed(extra, 2)}; it is of "
            "another network, or its configuration is another's"
        )
    remedy = "its tensors or its configuration disagree"
    if conversion.kind == "unified_perceptual_parsing":
        remedy = "if it has other classes, put its labels.json beside it"
    sources = {target: row.source for row in conversion.rows for target in row.targets}
    for name, shape in own.items():
        if name in tensors and tuple(tensors[name].shape) != tuple(shape):
            raise CheckpointError(
                f"{place}: {sources[name]} becomes {name} of shape {tuple(tensors[name].shape)}, and the model has "
                f"{tuple(shape)}; {remedy}"
            )
    return initial


# Kinds that cannot be converted ---------------------------------------------------------------------------------------


def _known() -> str:
    return "what can be converted: " + ", ".join(dialect.name for dialect in DIALECTS)


def _other_network(source: Source) -> str | None:
    """Return the name of a network that a source is a checkpoint of, if it is none that can be converted."""
    for pattern, network in OTHER_NETWORKS:
        if any(re.match(pattern, name) for name in source.tensors):
            return network
    names = set(source.tensors)
    levels = _count(r"decode_head\.lateral_convs\.(\d+)\.", names) + 1
    if levels > 1 and levels != 4:
        return f"a UPerNet over {levels} levels (the networks here have 4)"
    if levels == 1 and _count(r"decode_head\.psp_modules\.(\d+)\.", names):
        return "PSPNet"
    if levels == 1 and _count(r"decode_head\.convs\.(\d+)\.", names):
        return "FCN"
    model = source.settings.get("_model_class")
    if isinstance(model, str) and model != "UPerNet":
        return f"{shown(model)} of segmentation_models_pytorch"
    return None


def _count(pattern: str, names: Iterable[str]) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _unknown(source: Source) -> str:
    """Return a clause about a source that no dialect recognises."""
    if not source.tensors:
        return "holds no tensors"
    if "model_type" in source.settings:
        return "is a model folder of Transformers or fastuper already; load it with from_pretrained"
    if any(OURS.match(name) for name in source.tensors):
        return "has the names of Transformers or fastuper already: put its config.json beside it, and load the folder"
    found = library_of(source.tensors)
    names = listed(source.tensors, 2)
    return (
        f"is of {found[0]}, and no kind that is known" if found else f"is of an unknown library: its names are {names}"
    )
