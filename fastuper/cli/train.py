"""`fastuper train --data FOLDER --output RUN`."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastuper.cli.common import EXPECTED, LayoutName, LayoutOption, leave, one_line
from fastuper.data.images import read_labels
from fastuper.io.hub import find_file
from fastuper.io.messages import reason

if TYPE_CHECKING:
    from fastuper import UperNetConfig, UperNetForSemanticSegmentation, UperNetImageProcessor
    from fastuper.data.folders import FolderDataset, Layout

# torch is imported inside the functions that need it, so that `--help` answers at once.


class RecipeName(str, Enum):
    """The recipes that `--recipe` takes."""

    auto = "auto"
    convnext = "convnext"
    swin = "swin"


def train_model(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            "-d",
            metavar="FOLDER",
            help="images/ and labels/, each with training/ and validation/ inside or not; or ADE20K's or Cityscapes' "
            "folder. classes.txt in it names the classes, one a line.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="RUN", help="The run's folder; if it holds the same run, that goes on."),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="FOLDER|HUB_ID", help="A UPerNet checkpoint to begin from."),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER|HUB_ID",
            help="Where there is no --model: the backbone of a new UPerNet. convnext-, swin- tiny, small, base, large "
            "and resnet-18, 34, 50, 101 begin with random weights; the checkpoint of a folder or of the Hub with its "
            "own; timm/NAME with timm's.  [default: convnext-tiny]",
        ),
    ] = None,
    hidden_size: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="Channels of a new UPerNet's head; its auxiliary head has half.  [default: 512]"
        ),
    ] = None,
    layout: LayoutOption = LayoutName.auto,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The split to train on.  [default: training, where there are any]"),
    ] = None,
    validation_split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The split to validate on.  [default: validation, where there are any]"),
    ] = None,
    ignore_index: Annotated[
        int, typer.Option("--ignore-index", metavar="N", help="The label of pixels that no loss is taken at.")
    ] = 255,
    recipe: Annotated[
        RecipeName, typer.Option(help="The published learning rate and decays to take; auto: by the backbone.")
    ] = RecipeName.auto,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="How many times the weights are changed.")] = 160_000,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images of a step, over all GPUs and pieces.")
    ] = 16,
    accumulate: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Pieces that a step's images go through the network in, to save memory."),
    ] = 1,
    crop: Annotated[int, typer.Option(min=1, metavar="PIXELS", help="Side of the crops that are trained on.")] = 512,
    lr: Annotated[float | None, typer.Option(metavar="RATE", help="Instead of the recipe's learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(metavar="RATE", help="Instead of the recipe's.")] = None,
    layer_decay: Annotated[
        float | None,
        typer.Option(metavar="FACTOR", help="Instead of the recipe's: what learning rates fall by, a stage."),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Steps in which the learning rate rises.  [default: 1500, or steps/10]"),
    ] = None,
    clip: Annotated[
        float | None, typer.Option(metavar="NORM", help="The largest norm of the gradient.  [default: any]")
    ] = None,
    drop_path: Annotated[
        float | None,
        typer.Option(min=0, max=0.99, metavar="RATE", help="Stochastic depth.  [default: the backbone's own]"),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; the weights stay float32.")] = False,
    ema: Annotated[
        float | None,
        typer.Option(metavar="DECAY", help="Validate and save the moving average of the weights (0.999, say)."),
    ] = None,
    freeze_norm: Annotated[
        bool, typer.Option("--freeze-norm", help="Leave BatchNorm's statistics as they are.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute twice what would fill the memory.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of everything random.")] = 0,
    workers: Annotated[int, typer.Option(min=0, metavar="N", help="Processes that prepare images, for each GPU.")] = 2,
    log_every: Annotated[int, typer.Option(min=1, metavar="N", help="Steps between two lines of log.jsonl.")] = 10,
    validate_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Steps between two validations.  [default: a tenth of all]"),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Steps between two checkpoints.  [default: --validate-every]"),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave the GPU alone.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Remove the run that the output folder holds, and begin anew.")
    ] = False,
) -> None:
    """Train a UPerNet on photos and their label maps.

    RUN/best and RUN/last are checkpoints (config.json, model.safetensors, preprocessor_config.json) that `fastuper`
    and Transformers read; RUN/log.jsonl has the losses; `tensorboard --logdir RUN` shows them, and predicted pictures.

    Stopped in any way, the same command goes on from the last checkpoint, with the images and losses that would have
    come. On several GPUs or machines: `accelerate launch -m fastuper train ...`.

    Exit status: 0 all steps are done, 1 training stopped, 2 nothing could start, 130 stopped by Ctrl-C.
    """
    try:
        from fastuper.training.config import TrainingConfig, TrainingError
        from fastuper.training.trainer import Trainer
    except ImportError as error:
        leave(one_line(error))
    from fastuper.data.augment import TrainingTransform

    try:
        for option, value in (("--backbone", backbone), ("--hidden-size", hidden_size)):
            if model is not None and value is not None:
                raise ValueError(f"{option} is of a new UPerNet, and --model has its own; leave one of them out")
        config = TrainingConfig(
            steps=steps,
            batch_size=batch_size,
            accumulate=accumulate,
            recipe=recipe.value,
            learning_rate=lr,
            weight_decay=weight_decay,
            layer_decay=layer_decay,
            warmup_steps=warmup,
            clip=clip,
            bf16=bf16,
            ema=ema,
            freeze_norm=freeze_norm,
            seed=seed,
            workers=workers,
            log_every=log_every,
            validate_every=validate_every,
            save_every=save_every,
            cpu=cpu,
        )
        training, validation = _open(data, layout.value, split, validation_split, ignore_index)
        id2label = training.id2label or _found(training, validation, model)
        if len(id2label) == 1:
            raise ValueError(
                f"{data} names one class, {id2label[0]}, which every pixel would be; name another one in classes.txt, "
                f"for the pixels that are no {id2label[0]}"
            )
        network, processor = _build(
            model, backbone or "convnext-tiny", hidden_size or 512, id2label, ignore_index, drop_path, seed, crop
        )
        if gradient_checkpointing:
            network.gradient_checkpointing_enable()
        # Factor 1 is the scale that is validated at, whatever is cut out of it.
        base_size = min(processor.size["height"], processor.size["width"])
        transform = TrainingTransform(processor, crop, base_size=base_size, ignore_index=training.ignore_index)
        trainer = Trainer(
            network, config, training, validation, processor, output=output, transform=transform, restart=restart
        )
    except (*EXPECTED, ImportError, KeyError, TypeError) as error:
        leave(one_line(error))
    try:
        trainer.train()
    except KeyboardInterrupt:
        typer.echo("fastuper: stopped; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None
    except (TrainingError, *EXPECTED) as error:
        typer.echo(f"fastuper: {reason(error)}", err=True)  # whole: it lists files
        raise typer.Exit(1) from None
    trainer.accelerator.end_training()
    _note(f"{trainer.run.last} is the model" + ("" if validation is None else f", {trainer.run.best} the best one"))


def _note(message: str) -> None:
    """Print a line, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(message)


def _open(
    data: Path, layout: Layout, split: str | None, validation_split: str | None, ignore_index: int
) -> tuple[FolderDataset, FolderDataset | None]:
    """Return what to train on and what to validate on; the latter is None where there is no split for it."""
    from fastuper.data.folders import SPLIT_NAMES, find_splits, open_dataset

    splits = find_splits(data, layout)
    if validation_split is None and not {*splits} & {*SPLIT_NAMES[1]}:
        if splits or split is not None:
            _note(f"{data} has no split validation: there is no validation; --validation-split names one")
        else:
            _note(f"{data} has no splits: there is no validation, and all of it is trained on")
        return open_dataset(data, split or ("training" if splits else None), layout, ignore_index=ignore_index), None
    training, validation = (
        open_dataset(data, name, layout, ignore_index=ignore_index)
        for name in (split or "training", validation_split or "validation")
    )
    _note(f"{len(training)} photos to train on, {len(validation)} to validate on")
    return training, validation


def _found(training: FolderDataset, validation: FolderDataset | None, model: str | None) -> dict[int, str]:
    """Return the classes of data that does not name them: the model's where they suffice, else numbered ones."""
    from tqdm import tqdm

    from fastuper import UperNetConfig
    from fastuper.data.samples import checked_classes
    from fastuper.evaluation.loop import classes_of

    files = training.files + ([] if validation is None else validation.files)
    highest = 0
    for _, label_map in tqdm(files, desc="counting classes", unit="file", leave=False, disable=None):
        labels = read_labels(label_map)
        highest = max(highest, int(labels[labels != training.ignore_index].max(initial=0)))
    if highest == 0:
        raise ValueError(
            f"all labels are 0 or ignored; if {training.ignore_index} is a class, renumber it, or give --ignore-index"
        )
    if model is not None:
        names = classes_of(UperNetConfig.from_pretrained(model))
        if highest < len(names):
            _note(f"the data's classes have no names: they are {model}'s; classes.txt, one a line, names others")
            return names
    classes = {index: f"class {index}" for index in range(highest + 1)}
    checked_classes(classes, training.ignore_index)
    _note(f"{highest + 1} classes, which have no names: write classes.txt, one a line, to name them")
    return classes


def _build(
    model: str | None,
    backbone: str,
    hidden_size: int,
    id2label: dict[int, str],
    ignore_index: int,
    drop_path: float | None,
    seed: int,
    crop: int,
) -> tuple[UperNetForSemanticSegmentation, UperNetImageProcessor]:
    """Return the network to begin with, and the processor that is saved beside it."""
    import torch

    from fastuper import UperNetConfig, UperNetForSemanticSegmentation, UperNetImageProcessor
    from fastuper.evaluation.loop import check_classes, classes_of
    from fastuper.recipes.recipes import BACKBONES

    torch.manual_seed(seed)
    common: dict[str, Any] = {"id2label": id2label, "loss_ignore_index": ignore_index}
    heads: dict[str, Any] = {"hidden_size": hidden_size, "auxiliary_channels": hidden_size // 2}
    if model is not None:
        config = UperNetConfig.from_pretrained(model)
        if config.num_labels == 1 and len(id2label) == 2:  # its labels are 0 and 1: it stays a model of one class
            common["id2label"] = {0: id2label[1]}
        elif config.num_labels != len(id2label):
            _note(f"{model} has {config.num_labels} classes and the data {len(id2label)}: the classifiers begin anew")
        elif id2label != (names := classes_of(config)):
            check_classes(id2label, names)  # the same ones in another order would be learned anew, and nobody know why
            _note(f"{model}'s classes have other names than the data's: its classifiers go on from them, by number")
        config = UperNetConfig.from_dict(config.to_dict(), **common)
    elif backbone in BACKBONES:
        config = UperNetConfig(BACKBONES[backbone](), **common, **heads)
        _note(f"{backbone} begins with random weights")
    else:
        name = backbone.removeprefix("timm/")
        config = UperNetConfig(
            backbone=name, use_timm_backbone=name != backbone, use_pretrained_backbone=True, **common, **heads
        )
    if drop_path is not None:
        _set_drop_path(config, drop_path)
    if model is None:
        network = UperNetForSemanticSegmentation(config)
    else:
        network = UperNetForSemanticSegmentation.from_pretrained(
            model, config=config, dtype="float32", ignore_mismatched_sizes=True
        )
        if find_file(model, "preprocessor_config.json"):
            return network, UperNetImageProcessor.from_pretrained(model)
    return network, UperNetImageProcessor(size={"height": crop, "width": crop})


def _set_drop_path(config: UperNetConfig, rate: float) -> None:
    from fastuper.models.configuration import ForeignBackboneConfig
    from fastuper.models.upernet_configuration import named_backbone_config

    backbone = config.backbone_config or named_backbone_config(config)
    if not hasattr(backbone, "drop_path_rate"):
        raise ValueError(f"--drop-path: the configuration of a {backbone.model_type} has no such rate; leave it out")
    if config.backbone_config is None:
        config.backbone_kwargs = {**(config.backbone_kwargs or {}), "drop_path_rate": rate}
    elif isinstance(backbone, ForeignBackboneConfig):
        backbone.values["drop_path_rate"] = rate
    else:
        backbone.drop_path_rate = rate
