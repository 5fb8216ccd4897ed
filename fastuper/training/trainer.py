"""Training: one loop for a laptop, a GPU or many, which resumes where it was stopped.

The configuration, the data and the step's number determine a step: its images, their augmentation, and the branches
that stochastic depth drops. Therefore a run that is killed and started again has the same losses. A step of several
processes, or of several pieces one after another, equals the step of one process.
"""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Subset

from fastuper.data.augment import TrainingDataset, TrainingTransform
from fastuper.data.folders import FolderDataset
from fastuper.data.label_check import check_labels
from fastuper.data.processor import UperNetImageProcessor
from fastuper.data.samples import Sample, SampleDataset, as_samples, values_of
from fastuper.evaluation.confusion import ConfusionMatrix
from fastuper.evaluation.loop import check_classes, class_names, evaluate
from fastuper.inference.predictor import Predictor
from fastuper.io.messages import reason
from fastuper.models.backbones.registry import layer_depths
from fastuper.models.upernet import UperNetForSemanticSegmentation
from fastuper.recipes.recipes import learning_rate_factor, parameter_groups
from fastuper.training.batches import Batch, CheckedItems, StepSampler, UnusableImage, collate, derived_seed
from fastuper.training.checkpoints import (
    STATE,
    load_optimizer,
    named_failures,
    optimizer_by_names,
    read_state,
    tensor_bytes,
    write_state,
)
from fastuper.training.config import TrainingConfig, TrainingError
from fastuper.training.monitor import Monitor, compare_labels
from fastuper.training.processes import make_accelerator
from fastuper.training.runs import RunFolder, is_best
from fastuper.training.settings import differences, loss_settings
from fastuper_kernels.dispatch.torch_private import BatchNorm, copy_each_, lerp_each_


class Trainer:
    """Trains a model on a dataset, into a folder.

    The folder then has `last` and `best`, checkpoints that `from_pretrained` of fastuper and of Transformers load,
    `log.jsonl` and TensorBoard's events; see `fastuper.training.runs`. If it has checkpoints already, training resumes
    from the newest.

    Under `accelerate launch` (or torchrun) every process makes the same trainer, and takes its part of every step.

    Args:
        model: a UPerNet; it is trained in place, usually in float32.
        config: the options of training.
        train_data: a map-style dataset; see `fastuper.data.samples.as_samples`.
        validation_data: like `train_data`; None validates nothing, and makes no `best`.
        processor: prepares images for validation, and is saved with the model; None is the default processor.
        output: the folder.
        transform: returns `pixel_values`, `labels` and `name` for a sample and a `numpy.random.Generator`; None is
            `fastuper.data.augment.TrainingTransform(processor)`.
        restart: whether to remove a run that the folder has, and start from the beginning.

    Attributes:
        step: the number of steps that are done.
        best: the step and the mIoU of the best validation; None before the first.
        run: the `fastuper.training.runs.RunFolder`.
        accelerator: Accelerate's `Accelerator`: the processes and the device.

    Raises:
        ImportError: Accelerate or TensorBoard is missing; the message names the extra.
        TrainingError: the folder has a run with other settings, of another model, or without an intact checkpoint, or
            another training runs in it; the message says which.
        ValueError: the data is empty or has one class, or `batch_size` cannot be divided among processes and pieces.
    """

    def __init__(
        self,
        model: UperNetForSemanticSegmentation,
        config: TrainingConfig,
        train_data: Any,
        validation_data: Any = None,
        processor: UperNetImageProcessor | None = None,
        *,
        output: str | os.PathLike[str],
        transform: Callable[[Sample, np.random.Generator], dict[str, Any]] | None = None,
        restart: bool = False,
    ):
        backbone_config: Any = model.config.backbone_config
        self.config, self.plan = config, config.plan(backbone_config)
        if self.plan.recipe.layer_decay != 1:
            layer_depths(backbone_config.model_type)  # refuses a backbone without layer depths
        self.accelerator = accelerator = make_accelerator(model, config.cpu)
        pieces = accelerator.num_processes * config.accumulate
        if config.batch_size % pieces:
            raise ValueError(
                f"batch_size={config.batch_size} must be a multiple of {accelerator.num_processes} processes x "
                f"accumulate={config.accumulate}"
            )
        self.piece_size = config.batch_size // pieces
        self.processor = UperNetImageProcessor() if processor is None else processor
        if transform is None:
            transform = TrainingTransform(self.processor, ignore_index=model.config.loss_ignore_index)
        train_samples = _checked_samples(train_data, model, "training")
        self.train_data = TrainingDataset(train_samples, transform, config.seed)
        self.validation_data = (
            None if validation_data is None else _checked_samples(validation_data, model, "validation")
        )

        self.model = model.to(accelerator.device)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda" and not config.freeze_norm:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.averaged = (
            None
            if config.ema is None
            else AveragedModel(self.model, multi_avg_fn=partial(_update_average, config.ema), use_buffers=True)
        )
        fused = accelerator.device.type in ("cpu", "cuda")
        groups = parameter_groups(self.model, self.plan.recipe)
        # This is not Accelerate's optimizer, which does nothing while another loop of this process accumulates
        # gradients.
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=fused)
        self.parallel = accelerator.prepare(self.model)
        factor = partial(
            learning_rate_factor, steps=config.steps, warmup_steps=self.plan.warmup_steps, power=config.power
        )
        self.scheduler = LambdaLR(self.optimizer, factor)

        self.run = RunFolder(output)
        self.monitor = Monitor(self.run, config.batch_size, accelerator.is_main_process)
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.learning_rate = 0.0  # the highest of the last step
        self._names: list[str] = []  # images of the last step
        self._unchecked: list[tuple[int, torch.Tensor, list[str]]] = []  # step, loss and images since the last check
        self._unlogged: list[float] = []  # losses of the steps since the last line of the log
        # The images in which classes were counted; None when two classes were found, or all label maps checked before.
        self._watched = None if isinstance(train_samples, FolderDataset) else 0
        self._classes: set[int] = set()
        self._needs_validation = False  # whether the checkpoint that training resumes from is not validated yet
        self._check_labels(train_samples)
        weakref.finalize(self, self.run.lock.release)  # if the trainer is never used
        try:
            self._open_run(restart)
        except BaseException:
            self.run.lock.release()
            raise

    def _check_labels(self, train_samples: SampleDataset) -> None:
        """Check the label maps of training and validation; see `fastuper.data.label_check`."""
        names = class_names(self.model)
        known: set[int] = set()
        if isinstance(train_samples, FolderDataset):
            known = check_labels(train_samples, names, training=True, notify=self.monitor.say).classes
        if isinstance(self.validation_data, FolderDataset):
            check_labels(self.validation_data, names, training=False, known=known, notify=self.monitor.say)

    def train(self) -> None:
        """Do the remaining steps.

        Raises:
            TrainingError: the loss is NaN or infinite, an image cannot be read, or a checkpoint cannot be written; the
                message names the step and the files. The last checkpoint stays intact, and a new `Trainer` with the
                same arguments resumes from it.
        """
        with contextlib.ExitStack() as stack:
            self._in_first_process(lambda: stack.enter_context(self.run.lock.hold()))
            self._train()

    def _train(self) -> None:
        config = self.config
        self._discard_interrupted_step()
        if self.step == config.steps and not self._needs_validation:
            self.monitor.say(f"{self.run.path} has all {config.steps} steps")
            return
        batches = self._load_batches()
        with self.monitor.open(self.step, config.steps):
            self._set_train_mode()
            if self._needs_validation:
                self._validate_checkpoint()
            while self.step < config.steps:
                self._train_step([_usable(next(batches)) for _ in range(config.accumulate)])
                validates = self._validates_after(self.step)
                saves = validates or self.step % self.plan.save_every == 0 or self.step == config.steps
                if saves or self.step % config.log_every == 0:
                    self._log_losses()
                self.monitor.advance()
                if saves:
                    self._check_weights()
                    self._save_checkpoint()
                if validates:
                    self._validate_checkpoint()
                if saves:
                    self.monitor.restart_clock()

    @property
    def saved_model(self) -> UperNetForSemanticSegmentation:
        """The model that is validated and saved: with averaged weights if `ema` is set, else the trained model."""
        return self.model if self.averaged is None else cast(UperNetForSemanticSegmentation, self.averaged.module)

    # Steps

    def _load_batches(self) -> Iterator[Batch | UnusableImage]:
        """Return the pieces of the remaining steps, in order."""
        config, accelerator = self.config, self.accelerator
        ignore_index = self.model.config.loss_ignore_index
        sampler = StepSampler(
            len(self.train_data),
            config.batch_size,
            config.seed,
            config.steps,
            start=self.step,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            accumulate=config.accumulate,
        )
        loader = DataLoader(
            CheckedItems(self.train_data, len(class_names(self.model)), ignore_index),
            batch_sampler=sampler,
            num_workers=config.workers,
            collate_fn=partial(collate, ignore_index=ignore_index),
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),  # a draw from torch's generator would change all later draws
        )
        return iter(loader)

    def _set_train_mode(self) -> None:
        """Put the model into training mode; with `freeze_norm` its BatchNorms stay in evaluation mode."""
        self.model.train()
        if self.config.freeze_norm:
            for module in self.model.modules():
                if isinstance(module, BatchNorm):
                    module.eval()

    def _discard_interrupted_step(self) -> None:
        """Discard gradients and losses of a step that was interrupted, if `train` is called again."""
        self.optimizer.zero_grad()
        self._unchecked.clear()
        self._unlogged.clear()

    def _train_step(self, pieces: Sequence[Batch]) -> None:
        """Update the weights once, by the gradient of the mean loss over the pixels of all pieces and processes."""
        # Stochastic depth and dropout of this step draw from this seed; earlier draws have no influence.
        torch.manual_seed(derived_seed(self.config.seed, "step", self.step, self.accelerator.process_index))
        loss = self._backward(pieces)
        self._names = [name for piece in pieces for name in piece.names]
        self._watch_classes(pieces)
        self._unchecked.append((self.step + 1, loss, self._names))
        if _checks_every_step(self.accelerator.device):
            self._check_losses()
        if self.config.clip is not None:
            self.accelerator.clip_grad_norm_(self.parallel.parameters(), self.config.clip)
        self.learning_rate = float(max(self.scheduler.get_last_lr()))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        self.step += 1

    def _watch_classes(self, pieces: Sequence[Batch]) -> None:
        """Say after the first epoch if it had one class only, as masks of 0 and 255 have."""
        if self._watched is None:
            return
        ignored, names = self.model.config.loss_ignore_index, class_names(self.model)
        for piece in pieces:
            self._classes |= {*values_of(piece.labels.numpy())} - {ignored}
            self._watched += len(piece.names)
        if len(self._classes) > 1:
            self._watched = None
        elif self._watched * self.accelerator.num_processes >= len(self.train_data):
            only = "".join(f"{number} ({names[number]}) or " for number in self._classes)
            self.monitor.say(
                f"all labels of the first {self._watched} training images are {only}ignored ({ignored}); if {ignored} "
                "is a class, as in masks of 0 and 255, stop, and renumber it"
            )
            self._watched = None

    def _backward(self, pieces: Sequence[Batch]) -> torch.Tensor:
        """Compute the gradients of a step; return its loss, the same scalar in all processes."""
        accelerator = self.accelerator
        valid = sum((piece.valid for piece in pieces), torch.zeros((), dtype=torch.int64)).to(accelerator.device)
        valid = accelerator.reduce(valid, "sum").clamp(min=1)
        total = torch.zeros((), device=accelerator.device)
        for number, piece in enumerate(pieces):
            is_last = number == len(pieces) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.parallel):
                loss = self._loss(piece, valid)
                # Data parallelism takes the mean of the processes' gradients; the loss is the sum of their parts.
                accelerator.backward(loss * accelerator.num_processes)
            total = total + loss.detach()
        return accelerator.reduce(total, "sum")

    def _loss(self, piece: Batch, valid: torch.Tensor) -> torch.Tensor:
        """Return this piece's part of the mean loss over `valid` pixels."""
        device = self.accelerator.device
        pixel_values = piece.pixel_values.to(device, non_blocking=True)
        labels = piece.labels.to(device, non_blocking=True)
        with self._autocast():
            output = self.parallel(
                pixel_values=pixel_values, labels=labels, output_logits=False, num_items_in_batch=valid
            )
        return output.loss

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        # Accelerate's autocast is not used: its precision cannot change in the life of a process.
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.bf16)

    def _check_losses(self) -> None:
        """Check that the losses since the last check are finite. All processes have them, and stop together."""
        if not self._unchecked:
            return
        losses = torch.stack([loss for _, loss, _ in self._unchecked]).tolist()
        for (step, _, names), loss in zip(self._unchecked, losses, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(self._not_finite(f"the loss of step {step} is {loss}", names))
        self._unlogged += losses
        self._unchecked.clear()

    def _check_weights(self) -> None:
        """Check that weights and statistics are finite after the last step: gradients may overflow at a finite loss.

        All processes stop together, though each may have its own statistics.
        """
        tensors = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()])
        wrong = self.accelerator.reduce((~finite).long(), "sum").tolist()
        if any(wrong):
            name = next(name for name, count in zip(tensors, wrong, strict=True) if count)
            raise TrainingError(
                self._not_finite(f"{name} is NaN or infinite after step {self.step}, whose loss was not", self._names)
            )

    def _not_finite(self, fault: str, names: list[str]) -> str:
        from accelerate.utils import gather_object

        files = ", ".join(gather_object(names))
        return f"{fault}; the step's images: {files}. {self._kept()}; a lower learning rate or clipping may help"

    def _kept(self) -> str:
        steps = [*self.run.steps()]
        return f"The checkpoint of step {steps[-1]} is intact" if steps else "There is no checkpoint yet"

    def _log_losses(self) -> None:
        """Check the losses since the last line of the log, and log their mean."""
        self._check_losses()
        best = None if self.best is None else self.best["mIoU"]
        try:
            self.monitor.log_losses(self.step, self._unlogged, self.learning_rate, best)
        except OSError as error:
            raise TrainingError(
                f"the losses up to step {self.step} could not be logged in {self.run.path}: {reason(error)}. "
                f"{self._kept()}"
            ) from None
        self._unlogged.clear()

    # Validation

    def _validates_after(self, step: int) -> bool:
        """Return True if a validation follows after this number of steps."""
        due = step % self.plan.validate_every == 0 or step == self.config.steps
        return self.validation_data is not None and step > 0 and due

    def _validate_checkpoint(self) -> None:
        """Validate the checkpoint that was just written, and record the best checkpoint beside it."""
        try:
            self._validate()
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            raise TrainingError(
                f"the validation of step {self.step} failed: {reason(error)}. {self._kept()}; the same run resumes "
                "from it, and validates first"
            ) from error
        if self.accelerator.is_main_process:
            try:
                self.run.write_validation(self.step, self.best)
                self.run.link_and_prune(self.step, self._best_step)
            except OSError as error:
                raise TrainingError(
                    f"the validation of step {self.step} could not be written to {self.run.path}: {error}. "
                    f"{self._kept()}"
                ) from None
        self._needs_validation = False

    def _validate(self) -> None:
        """Measure the mIoU of the saved model, log it, and update `best`."""
        model = self.saved_model.eval()
        confusion = self._evaluate(model)
        miou = confusion.mean_iou
        if math.isnan(miou):
            raise ValueError(f"all pixels of the validation data are ignored (label {confusion.ignore_index})")
        if self.best is None or miou > self.best["mIoU"]:
            self.best = {"step": self.step, "mIoU": miou}
        self.monitor.log_validation(self.step, confusion)
        if self.accelerator.is_main_process:
            self._add_pictures(model, confusion)
        self._set_train_mode()

    def _evaluate(self, model: UperNetForSemanticSegmentation) -> ConfusionMatrix:
        """Return the confusion matrix of the validation data; each process evaluates its share of the images."""
        samples, accelerator = self.validation_data, self.accelerator
        assert samples is not None
        if accelerator.num_processes > 1:
            # Without SyncBatchNorm each process has its own statistics; the first process saves its own.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        own = range(accelerator.process_index, len(samples), accelerator.num_processes)
        with self._autocast():
            confusion = evaluate(
                model, Subset(samples, own), self.processor, batch_size=self.piece_size, workers=self.config.workers
            )
        confusion.matrix = accelerator.reduce(confusion.matrix, "sum")
        return confusion

    def _add_pictures(self, model: UperNetForSemanticSegmentation, confusion: ConfusionMatrix) -> None:
        """Add the predictions of the first validation images to TensorBoard's file."""
        samples = self.validation_data
        assert samples is not None
        predictor = Predictor(model, self.processor)
        for index in range(min(self.config.pictures, len(samples))):
            sample = samples[index]
            with self._autocast():
                prediction = predictor([sample.image], [sample.label.shape])[0]
            self.monitor.add_picture(self.step, index, compare_labels(sample, prediction.cpu().numpy(), confusion))

    # Checkpoints and resuming

    @property
    def _best_step(self) -> int | None:
        return None if self.best is None else self.best["step"]

    def _settings(self) -> dict[str, Any]:
        return loss_settings(self.config, self.plan, self.model.config, self.processor, self.train_data)

    def _in_first_process(self, action: Callable[[], Any]) -> Any:
        """Return the result of an action of the first process, in all processes; if it fails, all fail.

        Raises:
            TrainingError: the action raised it, OSError or ValueError; the message is the error's.
        """
        from accelerate.utils import broadcast_object_list

        result: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                result[0] = action()
            except (TrainingError, OSError, ValueError) as error:
                if self.accelerator.num_processes == 1:
                    raise
                result[1] = reason(error)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(result)
        if result[1] is not None:
            raise TrainingError(result[1])
        return result[0]

    def _save_checkpoint(self) -> None:
        """Write a checkpoint in the first process. If that fails, all processes stop together."""

        def save() -> None:
            try:
                self.run.save(self.step, self._best_step, self._write)
            except (OSError, ValueError) as error:
                raise TrainingError(
                    f"the checkpoint of step {self.step} could not be written to {self.run.path}: {reason(error)}. "
                    f"{self._kept()}; make space, and the same run resumes from it"
                ) from error

        self._in_first_process(save)

    def _write(self, folder: Path) -> None:
        """Write the files of a checkpoint."""
        state = {
            "step": self.step,
            "best": self.best,
            "settings": self._settings(),
            "piece_size": self.piece_size,
            "optimizer": optimizer_by_names(self.optimizer),
        }
        if self.averaged is not None:
            state |= {"model": self.model.state_dict(), "n_averaged": self.averaged.n_averaged}
        size = tensor_bytes(state) + tensor_bytes(self.saved_model.state_dict())
        with named_failures(folder, self.run.folder(self.step), size):
            self.saved_model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            write_state(folder, state)

    def _open_run(self, restart: bool) -> None:
        """Take the folder, and resume from its newest intact checkpoint; the log then ends at that step."""

        def find_checkpoint() -> tuple[int | None, list[str]]:
            self.run.take()
            if restart:
                self.run.clear()
            self.run.prepare()
            return self.run.newest_intact()

        step, damage = self._in_first_process(find_checkpoint)
        for line in damage:
            self.monitor.say(f"{line}: resuming from the one before")
        if step is not None:
            self._resume(step, self.run.folder(step))

        def follow() -> None:
            self.run.truncate_log(self.step, validated=not self._needs_validation)
            if self.step:
                self.run.link_and_prune(self.step, self._best_step, keep_newer=True)

        self._in_first_process(follow)

    def _resume(self, step: int, folder: Path) -> None:
        """Load the weights and the training state of a checkpoint.

        Raises:
            TrainingError: the checkpoint is of a run with other settings or another model, or of another version.
        """
        state, path = read_state(folder), folder / STATE
        if not isinstance(state.get("settings"), dict):
            raise TrainingError(
                f"{path} has no settings: another version wrote it; give another folder, or --restart (restart=True) "
                "to remove the run"
            )
        if changed := differences(state["settings"], self._settings()):
            raise TrainingError(
                f"{self.run.path} holds another run; give its options to resume it, or another folder, or --restart "
                f"(restart=True) to remove it: {changed}"
            )
        try:
            self._load(state, folder)
        except TrainingError:
            raise
        except Exception as error:  # KeyError, TypeError, IndexError, RuntimeError, ...: values of another form
            raise TrainingError(
                f"{path} does not have the form of this version's states ({type(error).__name__}: {reason(error)}); "
                "give another folder, or --restart (restart=True) to remove the run"
            ) from error
        validated, best = self.run.read_validation(step)
        self.step, self.best = step, best if validated else state["best"]
        self._needs_validation = self._validates_after(step) and not validated
        self.monitor.say(f"resuming from step {step} of {self.config.steps}, {folder}")
        if state["piece_size"] != self.piece_size and not self.config.freeze_norm:
            self.monitor.say(
                f"BatchNorm normalised over {state['piece_size']} images at a time up to here, and now normalises over "
                f"{self.piece_size}: losses may differ"
            )

    def _load(self, state: dict[str, Any], folder: Path) -> None:
        """Load the tensors of a checkpoint; parameters are matched by their names."""
        if state["best"] is not None and not is_best(state["best"]):
            raise TypeError(f"best is {state['best']!r}")
        int(state["piece_size"])
        load_optimizer(self.optimizer, state["optimizer"], folder / STATE)
        # The scheduler's own state follows from the step, and from the groups, whose order may differ.
        self.scheduler.load_state_dict(
            {
                "last_epoch": int(state["step"]),
                "_step_count": int(state["step"]) + 1,
                "base_lrs": [group["initial_lr"] for group in self.optimizer.param_groups],
                "_last_lr": [group["lr"] for group in self.optimizer.param_groups],
                "lr_lambdas": [None] * len(self.optimizer.param_groups),
            }
        )
        saved = type(self.model).from_pretrained(folder).state_dict()
        if self.averaged is None:
            self.model.load_state_dict(saved)
        else:
            self.model.load_state_dict(state["model"])
            self.averaged.module.load_state_dict(saved)
            self.averaged.n_averaged.copy_(state["n_averaged"])


def _checked_samples(dataset: Any, model: UperNetForSemanticSegmentation, use: str) -> SampleDataset:
    """Return a dataset as samples that fit the model.

    Raises:
        ValueError: the dataset is empty, ignores another label, or has other classes.
    """
    samples = as_samples(dataset)
    if len(samples) == 0:
        raise ValueError(f"the {use} data has no images")
    config = model.config
    if samples.ignore_index != config.loss_ignore_index:
        raise ValueError(
            f"the {use} data ignores label {samples.ignore_index}, the model loss_ignore_index="
            f"{config.loss_ignore_index}; give both the same"
        )
    if samples.id2label is not None:
        check_classes(samples.id2label, class_names(model))
    return samples


def _usable(batch: Batch | UnusableImage) -> Batch:
    """Return a batch; TrainingError if one of its images cannot be used."""
    if isinstance(batch, UnusableImage):
        raise TrainingError(batch.message)
    return batch


def _checks_every_step(device: torch.device) -> bool:
    """Return True on a CPU. On a GPU losses are checked later: reading a loss waits for all launched kernels."""
    return device.type == "cpu"


def _update_average(decay: float, averaged: Any, current: Any, _: Any) -> None:
    """Move averaged tensors towards the current ones, in place; integers (counts, indices) are copied."""
    if averaged[0].is_floating_point():
        lerp_each_(averaged, current, 1 - decay)
    else:
        copy_each_(averaged, current)
