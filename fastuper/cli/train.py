"""`fastuper train --data FOLDER --output RUN`: train a UPerNet on photos and label maps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fastuper.cli.common import LayoutOption, folder, leave, not_empty
from fastuper.cli.options import expand_dataclasses
from fastuper.io.messages import EXPECTED_ERRORS, one_line, reason
from fastuper.training.config import TrainingConfig, TrainingError

# torch is imported inside the functions that need it, so that `--help` answers at once.


@expand_dataclasses
def train_model(
    *,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            "-d",
            parser=folder,
            metavar="FOLDER",
            help="images/ and labels/, each with or without training/ and validation/ inside; or the folder of ADE20K "
            "or Cityscapes. classes.txt inside names the classes, one a line.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", parser=folder, metavar="RUN", help="Folder of the run; a run that it holds is resumed."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            parser=not_empty,
            metavar="FOLDER|HUB_ID",
            help="UPerNet checkpoint to start from. If the number of classes differs, the classifier is reinitialised. "
            "If only the names differ, its weights are kept.",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            parser=not_empty,
            metavar="NAME|FOLDER|HUB_ID|timm/NAME",
            help="Without --model: backbone of a new UPerNet. These names have random weights: convnext- and swin- "
            "with tiny, small, base, large; convnextv2- with atto, femto, pico, nano, tiny, base, large, huge; "
            "swinv2-tiny-, swinv2-small- and swinv2-base- with window8, window16; swinv2-base- and swinv2-large- with "
            "window12, window12to16, window12to24; resnet- with 18, 34, 50, 101, 50-deep-stem, "
            "101-deep-stem; vit-base-16, deit-small-16, deit-base-16, beit-base-16, beit-large-16, mae-base-16. "
            "These have pretrained weights: timm/NAME, any model of timm with four falling maps, and its vision "
            "transformers (timm/vit_base_patch16_224.mae); the folder or Hub id (owner/name) of one of these families, "
            "or of a model type of Transformers' AutoBackbone, such as facebook/dinov2-base.",
            show_default="convnext-tiny",
        ),
    ] = None,
    hidden_size: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Channels of a new UPerNet's decode head; the auxiliary head has half as many.",
            show_default="512",
        ),
    ] = None,
    layout: LayoutOption = "auto",
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Split to train on.", show_default="training, if there are splits"),
    ] = None,
    validation_split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Split to validate on.", show_default="validation, if there is one"),
    ] = None,
    ignore_index: Annotated[
        int, typer.Option("--ignore-index", metavar="N", help="Label of pixels that the loss ignores.")
    ] = 255,
    config: TrainingConfig,
    crop: Annotated[int, typer.Option(min=1, metavar="PIXELS", help="Side of the training crops.")] = 512,
    drop_path: Annotated[
        float | None,
        typer.Option(
            min=0, max=0.99, metavar="RATE", help="Rate of stochastic depth.", show_default="the backbone's own"
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Recompute activations in the backward pass to save memory."),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Remove the run in the output folder, and start from the beginning.")
    ] = False,
) -> None:
    """Train a UPerNet on photos and their label maps.

    RUN/best and RUN/last are checkpoints (config.json, model.safetensors, preprocessor_config.json) that `fastuper`
    and Transformers load. RUN/log.jsonl has the losses; `tensorboard --logdir RUN` shows them with predicted pictures.

    If a run was stopped, the same command resumes it from the last checkpoint, with the same images and losses. On
    several GPUs or machines: `accelerate launch -m fastuper train ...`.

    Exit status: 0 all steps are done, 1 training stopped, 2 nothing could start, 130 stopped by Ctrl-C.
    """
    try:
        import torch

        from fastuper.data.augment import TrainingTransform
        from fastuper.training.start import build_model, find_classes, open_splits
        from fastuper.training.trainer import Trainer
    except ImportError as error:
        leave(one_line(error))

    try:
        for option, value in (("--backbone", backbone), ("--hidden-size", hidden_size)):
            if model is not None and value is not None:
                raise ValueError(f"{option} is for a new UPerNet, and --model has its own; give only one of them")
        training, validation = open_splits(
            data, layout, split, validation_split, ignore_index=ignore_index, notify=_print_once
        )
        id2label = training.id2label or find_classes(training, validation, model, notify=_print_once)
        if len(id2label) == 1:
            raise ValueError(
                f"{data} names one class, {id2label[0]}, and every pixel would be in it; name a second class in "
                f"classes.txt, for the pixels that are no {id2label[0]}"
            )
        torch.manual_seed(config.seed)
        network, processor = build_model(
            id2label,
            model=model,
            backbone=backbone or "convnext-tiny",
            hidden_size=hidden_size or 512,
            drop_path_rate=drop_path,
            ignore_index=ignore_index,
            image_size=crop,
            notify=_print_once,
        )
        if gradient_checkpointing:
            network.gradient_checkpointing_enable()
        # Factor 1 of the augmentation is the scale of validation; the size of the crops does not matter.
        base_size = min(processor.size.values())
        transform = TrainingTransform(processor, crop, base_size=base_size, ignore_index=training.ignore_index)
        trainer = Trainer(
            network, config, training, validation, processor, output=output, transform=transform, restart=restart
        )
    except (*EXPECTED_ERRORS, ImportError) as error:
        leave(one_line(error))
    except (LookupError, TypeError, AttributeError) as error:  # a configuration of another form, most often
        source = f"the model {model}" if model is not None else f"the backbone {backbone or 'convnext-tiny'}"
        leave(f"cannot start with {source}: {type(error).__name__}: {one_line(error)}")
    try:
        trainer.train()
    except KeyboardInterrupt:
        typer.echo("fastuper: stopped; the same command resumes from the last checkpoint", err=True)
        raise typer.Exit(130) from None
    except (TrainingError, *EXPECTED_ERRORS) as error:
        typer.echo(f"fastuper: {reason(error)}", err=True)  # not shortened: it lists files
        raise typer.Exit(1) from None
    trainer.accelerator.end_training()
    best = "" if validation is None else f"; best model: {trainer.run.best}"
    _print_once(f"trained model: {trainer.run.last}{best}")


def _print_once(message: str) -> None:
    """Print a line in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(message)
