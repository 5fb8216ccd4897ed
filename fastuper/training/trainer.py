"""Training: one loop for a laptop, a GPU or many, that goes on where it was stopped.

What a step does follows from the configuration, the data and the step's number alone: which images it takes, how they
are augmented and which branches are dropped. So a run that is killed and started again has the losses it would have
had, and a step of several processes, or of several pieces one after another, is the step of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from fastuper.data.augment import TrainingDataset, TrainingTransform
from fastuper.data.classes import class_name, class_palette
from fastuper.data.folders import FolderDataset
from fastuper.data.overlay import blend
from fastuper.data.processor import UperNetImageProcessor
from fastuper.data.samples import Sample, SampleDataset, as_samples
from fastuper.evaluation.confusion import ConfusionMatrix
from fastuper.evaluation.loop import check_classes, class_names, evaluate
from fastuper.inference.predictor import Predictor
from fastuper.io.messages import reason
from fastuper.models.backbones import Backbone
from fastuper.models.backbones.registry import layer_depths
from fastuper.models.upernet import UperNetForSemanticSegmentation
from fastuper.recipes.recipes import learning_rate_factor, parameter_groups
from fastuper.training.batches import Batch, Collate, GlobalBatches, TrainingItems, seed_of
from fastuper.training.config import FREE, TrainingConfig, TrainingError
from fastuper.training.runs import STATE, RunFolder, read_state

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.utils.tensorboard import SummaryWriter


class Trainer:
    """Trains a model on a dataset, into a folder.

    The folder then has `last` and `best`, checkpoints that both libraries' `from_pretrained` reads, `log.jsonl` and
    TensorBoard's events; see `fastuper.training.runs`. If it has checkpoints already, training goes on from the newest.

    Under `accelerate launch` (or torchrun) every process makes the same trainer; each takes its part of every step.

    Args:
        model: a UPerNet; it is trained in place, in float32 most often.
        config: how.
        train_data: a map-style dataset; see `fastuper.data.samples.as_samples`.
        validation_data: the same; None validates nothing, and `best` stays away.
        processor: how images are prepared for validation and by whoever uses the model; the default one where None.
        output: the folder.
        transform: what makes `pixel_values`, `labels` and `name` of a sample and a `numpy.random.Generator`;
            `fastuper.data.samples.TrainingTransform(processor)` where None.
        restart: whether to begin anew where the folder has a run, which is then removed.

    Attributes:
        step: how many steps are done.
        best: the step of the best validation and its mIoU; None before the first.
        run: the `fastuper.training.runs.RunFolder`.
        accelerator: Accelerate's, which knows the processes and the device.

    Raises:
        ImportError: Accelerate or TensorBoard is missing; the message names the extra.
        TrainingError: the folder has a run that was trained otherwise; the message says what differs.
        ValueError: the data is empty, or `batch_size` cannot be divided among processes and pieces.
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
        backbone_type = model.config.backbone_config.model_type
        self.config, self.plan = config, config.plan(backbone_type)
        if self.plan.recipe.layer_decay != 1:
            layer_depths(backbone_type)  # refuses a backbone without layer depths
        self.accelerator = accelerator = _accelerator(config, model)
        pieces = accelerator.num_processes * config.accumulate
        if config.batch_size % pieces:
            raise ValueError(
                f"batch_size={config.batch_size} must be a multiple of {accelerator.num_processes} processes x "
                f"accumulate={config.accumulate}"
            )
        self.piece_size = config.batch_size // pieces
        self.processor = UperNetImageProcessor() if processor is None else processor
        ignore_index = model.config.loss_ignore_index
        if transform is None:
            transform = TrainingTransform(self.processor, ignore_index=ignore_index)
        train_samples = _samples(train_data, model, "training")
        self.train_data = TrainingDataset(train_samples, transform, config.seed)
        self.validation_data = None if validation_data is None else _samples(validation_data, model, "validation")

        self.model = model.to(accelerator.device)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda" and not config.freeze_norm:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.averaged = (
            None
            if config.ema is None
            else AveragedModel(self.model, multi_avg_fn=_Average(config.ema), use_buffers=True)
        )
        fused = accelerator.device.type in ("cpu", "cuda")
        groups = parameter_groups(self.model, self.plan.recipe)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=fused)
        # Not Accelerate's optimizer: it does nothing while any loop of this process is in the midst of accumulating.
        self.parallel, self.optimizer = accelerator.prepare(self.model), optimizer
        factor = partial(
            learning_rate_factor, steps=config.steps, warmup_steps=self.plan.warmup_steps, power=config.power
        )
        self.scheduler = LambdaLR(optimizer, factor)

        self.run = RunFolder(output)
        self.step = 0
        self.best: dict[str, Any] | None = None
        self._unchecked: list[tuple[int, torch.Tensor, list[str]]] = []
        self._unlogged: list[float] = []
        self._unvalidated = False  # whether the checkpoint that training goes on from is still to be validated
        self._start(restart)

    def train(self) -> None:
        """Do the steps that are left.

        Raises:
            TrainingError: the loss is NaN or infinite, an image cannot be read, or a checkpoint cannot be written; the
                message names the step and the files. The last good checkpoint stays, and a new `Trainer` with the same
                arguments goes on from it.
        """
        config, accelerator = self.config, self.accelerator
        self.optimizer.zero_grad()  # of a step that was interrupted, where this is called again
        self._unchecked.clear()
        self._unlogged.clear()
        if self.step == config.steps and not self._unvalidated:
            self._say(f"{self.run.path} has all {config.steps} steps")
            return
        batches = self._batches()
        with contextlib.ExitStack() as stack:
            self.writer = self._writer(stack)
            bar = stack.enter_context(
                tqdm(
                    initial=self.step,
                    total=config.steps,
                    unit="step",
                    dynamic_ncols=True,
                    disable=not accelerator.is_main_process,
                )
            )
            self._clock = time.perf_counter()
            self._train_mode()
            if self._unvalidated:
                self._validate_saved()
            while self.step < config.steps:
                self._one_step([self._next(batches) for _ in range(config.accumulate)])
                step = self.step
                validates = self._validates(step)
                saves = validates or step % self.plan.save_every == 0 or step == config.steps
                if saves or step % config.log_every == 0:
                    bar.set_postfix(self._log(), refresh=False)
                bar.update()
                if saves:
                    self._check_weights()
                    self._save()
                if validates:
                    self._validate_saved()
                if saves:
                    self._clock = time.perf_counter()

    def _validates(self, step: int) -> bool:
        """Return whether there is a validation after this many steps."""
        due = step % self.plan.validate_every == 0 or step == self.config.steps
        return self.validation_data is not None and step > 0 and due

    def _one_step(self, pieces: Sequence[Batch]) -> None:
        """Change the weights once: the gradient of the mean loss over all pixels, of all pieces and processes."""
        accelerator, config = self.accelerator, self.config
        # Stochastic depth and dropout of this step draw from here, whatever was drawn before.
        torch.manual_seed(seed_of(config.seed, "step", self.step, accelerator.process_index))
        valid = sum((piece.valid for piece in pieces), torch.zeros((), dtype=torch.int64)).to(accelerator.device)
        valid = accelerator.reduce(valid, "sum").clamp(min=1)
        total = torch.zeros((), device=accelerator.device)
        for number, piece in enumerate(pieces):
            is_last = number == len(pieces) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.parallel):
                loss = self._loss(piece, valid)
                # Data parallelism takes the mean of the gradients, where the loss is a sum of the processes' parts.
                accelerator.backward(loss * accelerator.num_processes)
            total = total + loss.detach()
        self._names = [name for piece in pieces for name in piece.names]
        self._unchecked.append((self.step + 1, accelerator.reduce(total, "sum"), self._names))
        if _looks_at_each_step(accelerator.device):
            self._check()
        if config.clip is not None:
            accelerator.clip_grad_norm_(self.parallel.parameters(), config.clip)
        self.learning_rate = max(self.scheduler.get_last_lr())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        self.step += 1

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

    def _check(self) -> None:
        """Look at the losses that nobody has seen yet; all processes see the same, and stop together."""
        if not self._unchecked:
            return
        losses = torch.stack([loss for _, loss, _ in self._unchecked]).tolist()
        for (step, _, names), loss in zip(self._unchecked, losses, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(self._not_finite(f"the loss of step {step} is {loss}", names))
        self._unlogged += losses
        self._unchecked.clear()

    def _check_weights(self) -> None:
        """See that the last step left numbers: a finite loss may have had infinite gradients.

        All processes together, for each may have statistics of its own.
        """
        tensors = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()])
        wrong = self.accelerator.reduce((~finite).long(), "sum").tolist()
        if any(wrong):
            name = next(name for name, count in zip(tensors, wrong, strict=True) if count)
            raise TrainingError(
                self._not_finite(f"{name} is NaN or infinite after step {self.step}, whose loss was not", self._names)
            )

    def _not_finite(self, what: str, names: list[str]) -> str:
        from accelerate.utils import gather_object

        files = ", ".join(gather_object(names))
        return f"{what}; the step's images: {files}. {self._kept()}; a lower learning rate or clipping may help"

    def _kept(self) -> str:
        steps = [*self.run.steps()]
        return f"The checkpoint of step {steps[-1]} is intact" if steps else "There is no checkpoint yet"

    def _log(self) -> dict[str, str]:
        """Write a line about the steps since the last one; return what the progress bar shows."""
        self._check()
        now = time.perf_counter()
        values = {
            "loss": sum(self._unlogged) / len(self._unlogged),
            "lr": self.learning_rate,
            "images_per_second": len(self._unlogged) * self.config.batch_size / (now - self._clock),
        }
        self._unlogged.clear()
        self._clock = now
        if self.writer is not None:
            try:
                self.run.write_log({"step": self.step, **values})
                for name, value in values.items():
                    self.writer.add_scalar(f"train/{name}", value, self.step)
            except OSError as error:
                raise TrainingError(
                    f"the losses up to step {self.step} could not be logged in {self.run.path}: {reason(error)}. "
                    f"{self._kept()}"
                ) from None
        shown = {"loss": f"{values['loss']:.4f}", "lr": f"{values['lr']:.2e}"}
        if self.best is not None:
            shown["best mIoU"] = f"{self.best['mIoU']:.4f}"
        return shown

    def _validate(self) -> None:
        """Measure the mIoU of what is saved, each process on its share of the images; remember the best."""
        samples, accelerator = self.validation_data, self.accelerator
        assert samples is not None
        model = self.saved_model.eval()
        if accelerator.num_processes > 1:  # without SyncBatchNorm each has statistics of its own; the first's are saved
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        own = range(accelerator.process_index, len(samples), accelerator.num_processes)
        with self._autocast():
            confusion = evaluate(
                model, Subset(samples, own), self.processor, batch_size=self.piece_size, workers=self.config.workers
            )
        confusion.matrix = accelerator.reduce(confusion.matrix, "sum")
        scores = {"mIoU": confusion.mean_iou, "mean accuracy": confusion.mean_accuracy}
        if math.isnan(scores["mIoU"]):
            raise ValueError(f"all pixels of the validation data are ignored (label {confusion.ignore_index})")
        if self.best is None or scores["mIoU"] > self.best["mIoU"]:
            self.best = {"step": self.step, "mIoU": scores["mIoU"]}
        if self.writer is not None:
            self.run.write_log({"step": self.step, **scores})
            for name, value in scores.items():
                self.writer.add_scalar(f"val/{name}", value, self.step)
            for index, value in enumerate(confusion.iou.tolist()):
                self.writer.add_scalar(f"val IoU/{class_name(confusion.id2label, index)}", value, self.step)
            predictor = Predictor(model, self.processor)
            for index in range(min(self.config.pictures, len(samples))):
                sample = samples[index]
                with self._autocast():
                    prediction = predictor([sample.image], [sample.label.shape])[0]
                picture = _picture(sample, prediction.cpu().numpy(), confusion)
                self.writer.add_image(f"photo, truth, prediction/{index}", picture, self.step, dataformats="HWC")
        self._train_mode()

    def _validate_saved(self) -> None:
        """Validate the checkpoint that was just written, and note there what is the best one."""
        try:
            self._validate()
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            raise TrainingError(
                f"the validation of step {self.step} failed: {reason(error)}. {self._kept()}; the same run goes on "
                "from there, and validates first"
            ) from error
        if self.accelerator.is_main_process:
            try:
                self.run.write_best(self.step, self.best)
                self.run.settle(self.step, self._best_step)
            except OSError as error:
                raise TrainingError(
                    f"the validation of step {self.step} could not be written to {self.run.path}: {error}. "
                    f"{self._kept()}"
                ) from None
        self._unvalidated = False

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        # Not Accelerate's: its precision is one for the whole life of a process.
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.bf16)

    @property
    def saved_model(self) -> UperNetForSemanticSegmentation:
        """The model that is validated and saved: the one of the averaged weights, where there are any."""
        return self.model if self.averaged is None else cast(UperNetForSemanticSegmentation, self.averaged.module)

    @property
    def _best_step(self) -> int | None:
        return None if self.best is None else self.best["step"]

    def _save(self) -> None:
        """Write a checkpoint; the processes go on together, or stop together."""
        from accelerate.utils import broadcast_object_list

        failure: list[str | None] = [None]
        if self.accelerator.is_main_process:
            try:
                self.run.save(self.step, self._best_step, self._write)
            except (OSError, RuntimeError) as error:  # torch.save has the latter for a full disk
                failure = [str(error)]
        broadcast_object_list(failure)
        if failure[0] is not None:
            raise TrainingError(
                f"the checkpoint of step {self.step} could not be written to {self.run.path}: {failure[0]}. "
                f"{self._kept()}; when there is room, the same run goes on from there"
            )

    def _write(self, folder: Path) -> None:
        """Write a checkpoint's files."""
        self.saved_model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        state = {
            "step": self.step,
            "best": self.best,
            "curve": self._curve(),
            "piece_size": self.piece_size,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        if self.averaged is not None:
            state |= {"model": self.model.state_dict(), "n_averaged": self.averaged.n_averaged}
        torch.save(state, folder / STATE)

    def _start(self, restart: bool) -> None:
        """Go on from the newest checkpoint, if there is one, and have the log end there."""
        if self.accelerator.is_main_process:
            self.run.check()
            if restart:
                self.run.clear()
            self.run.make()
        self.accelerator.wait_for_everyone()
        if steps := self.run.steps():
            step, folder = steps.popitem()
            state = read_state(folder)
            self._compare(state["curve"])
            saved = type(self.model).from_pretrained(folder).state_dict()
            if self.averaged is None:
                self.model.load_state_dict(saved)
            else:
                self.model.load_state_dict(state["model"])
                self.averaged.module.load_state_dict(saved)
                self.averaged.n_averaged.copy_(state["n_averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.step, self.best = step, state["best"]
            validated, best = self.run.read_best(step)
            if validated:
                self.best = best
            self._unvalidated = self._validates(step) and not validated
            self._say(f"going on from step {step} of {self.config.steps}, {folder}")
            if state["piece_size"] != self.piece_size and not self.config.freeze_norm:
                before, now = state["piece_size"], self.piece_size
                self._say(
                    f"BatchNorm has seen {before} images at once until here and now sees {now}: losses may differ"
                )
        if self.accelerator.is_main_process:
            self.run.truncate_log(self.step, validated=not self._unvalidated)
            if self.step:
                self.run.settle(self.step, self._best_step)

    def _curve(self) -> dict[str, Any]:
        """Return all that decides the losses, in types that JSON has."""
        decided = dataclasses.asdict(self.config) | dataclasses.asdict(self.plan.recipe)
        config = {k: v for k, v in decided.items() if k not in FREE} | {"warmup_steps": self.plan.warmup_steps}
        model = {k: v for k, v in self.model.config.to_dict().items() if k not in ("_name_or_path", "architectures")}
        options = getattr(self.train_data.transform, "__dict__", {})
        transform = {k: v for k, v in options.items() if not k.startswith("_") and _is_plain(v)}
        values = {**config, **transform, "images": len(self.train_data), "model": model}
        if isinstance(self.train_data.samples, FolderDataset):
            values["images' names"] = _digest([photo for photo, _ in self.train_data.samples.files])
        values["processor"] = self.processor.to_dict()
        return json.loads(json.dumps(values, default=str))

    def _compare(self, before: dict[str, Any]) -> None:
        """Raise TrainingError where the run that is to go on was another."""
        now = self._curve()
        for values in (before, now):
            for part in ("model", "processor"):
                values |= {f"{part}.{name}": value for name, value in values.pop(part, {}).items()}
        names = [name for name in now.keys() | before.keys() if now.get(name) != before.get(name)]
        if names:
            differences = ", ".join(
                f"{name} was {before.get(name)} and is now {now.get(name)}" for name in sorted(names)
            )
            raise TrainingError(
                f"{self.run.path} holds another run; take its options to go on, another folder, or --restart "
                f"(restart=True) to remove it: {differences}"
            )

    def _batches(self) -> Iterator[Any]:
        config, accelerator = self.config, self.accelerator
        sampler = GlobalBatches(
            len(self.train_data),
            config.batch_size,
            config.seed,
            config.steps,
            self.step,
            accelerator.process_index,
            accelerator.num_processes,
            config.accumulate,
        )
        loader = DataLoader(
            TrainingItems(self.train_data, len(class_names(self.model)), self.model.config.loss_ignore_index),
            batch_sampler=sampler,
            num_workers=config.workers,
            collate_fn=Collate(self.model.config.loss_ignore_index),
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),  # its own: what it draws is not missing elsewhere
        )
        return iter(loader)

    def _next(self, batches: Iterator[Any]) -> Batch:
        batch = next(batches)
        if isinstance(batch, str):
            raise TrainingError(batch)
        return batch

    def _train_mode(self) -> None:
        self.model.train()
        if self.config.freeze_norm:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _writer(self, stack: contextlib.ExitStack) -> SummaryWriter | None:
        """Return what writes TensorBoard's events, in the first process; those of steps that come again are dropped."""
        if not self.accelerator.is_main_process:
            return None
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.run.tensorboard), purge_step=self.step + 1)

        def close() -> None:
            with contextlib.suppress(OSError):  # a full disk has stopped the training already, or it is at its end
                writer.close()

        stack.callback(close)
        return writer

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(message)


def _digest(files: Sequence[Path]) -> str:
    """Return what tells other files from these, wherever their folder lies."""
    above = Path(os.path.commonpath([file.parent for file in files])).parent
    names = "\n".join(Path(os.path.relpath(file, above)).as_posix() for file in files)
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _is_plain(value: Any) -> bool:
    """Return whether JSON has a value; what another process would print of other objects is where they lie."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _looks_at_each_step(device: torch.device) -> bool:
    """Return whether a loss is there at once; elsewhere the host would wait, at each step, for all it has launched."""
    return device.type == "cpu"


def _samples(dataset: Any, model: UperNetForSemanticSegmentation, use: str) -> SampleDataset:
    """Return a dataset that fits the model; ValueError says why it does not."""
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


def _picture(sample: Sample, prediction: NDArray[np.integer], confusion: ConfusionMatrix) -> NDArray[np.uint8]:
    """Return the photo, the photo under its true classes, and under the predicted ones, side by side; (H, W, 3).

    Ignored pixels are black.
    """
    photo = sample.image
    if not isinstance(photo, Image.Image):  # of other than three channels, the first ones are shown
        photo = Image.fromarray(photo[..., :3] if photo.shape[2] >= 3 else photo[..., 0]).convert("RGB")
    palette = np.concatenate([class_palette(confusion.id2label), np.zeros((1, 3), dtype=np.uint8)])
    truth = np.where(sample.label == confusion.ignore_index, len(palette) - 1, sample.label.astype(np.int64))
    shown = [(truth, 0.0), (truth, 0.6), (prediction, 0.6)]
    return np.concatenate(
        [np.asarray(blend(photo, labels, palette, alpha, max_side=512)) for labels, alpha in shown], axis=1
    )


class _Average:
    """Moves averaged tensors towards the current ones; whole numbers (counts, indices) are taken as they are."""

    def __init__(self, decay: float):
        self.decay = decay

    def __call__(self, averaged: Any, current: Any, _: Any) -> None:
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - self.decay)
        else:
            torch._foreach_copy_(averaged, current)


def _accelerator(config: TrainingConfig, model: nn.Module) -> Accelerator:
    missing = [name for name in ("accelerate", "tensorboard") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"training needs {' and '.join(missing)}: pip install 'fastuper[train]'")
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import GradientAccumulationPlugin

    # Our backbones use all of their parameters, up to the last map; of others' some have none to give a gradient to.
    backbone = model.backbone
    whole = isinstance(backbone, Backbone) and backbone.out_features[-1] == backbone.stage_names[-1]
    data_parallel = DistributedDataParallelKwargs(find_unused_parameters=not whole)
    # Said here, lest the environment (ACCELERATE_MIXED_PRECISION and the like) change what a step does.
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        kwargs_handlers=[data_parallel],
    )
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(
            f"Accelerate is configured for {kind}, and training here is data parallel alone: choose no {kind} in "
            "`accelerate config`, or give `accelerate launch --multi_gpu`"
        )
    return accelerator
