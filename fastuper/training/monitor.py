"""The reports of a training run: progress bar, log.jsonl, and TensorBoard's curves and pictures."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from fastuper.data.classes import class_name, class_palette
from fastuper.data.overlay import blend
from fastuper.data.samples import Sample
from fastuper.evaluation.confusion import ConfusionMatrix
from fastuper.training.runs import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Monitor:
    """Reports a run on the terminal and in its folder.

    Args:
        run: the folder of the run.
        batch_size: images of a step.
        is_active: whether this process reports: the first does, and in others the methods have no effect.
    """

    def __init__(self, run: RunFolder, batch_size: int, is_active: bool):
        self.run, self.batch_size, self.is_active = run, batch_size, is_active
        self._writer: SummaryWriter | None = None
        self._bar = tqdm(disable=True)
        self._steps = 0
        self._clock = 0.0

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.is_active:
            tqdm.write(message)
            sys.stdout.flush()  # in a log, lines and errors have their order

    @contextlib.contextmanager
    def open(self, step: int, steps: int) -> Iterator[None]:
        """Show the progress bar and open TensorBoard's file while the block runs.

        Without a terminal there is no bar; then `log_losses` prints a line each time.

        Args:
            step: the number of steps that are done; events of later steps are removed from TensorBoard's curves.
            steps: the number of all steps.
        """
        self._steps = steps
        with contextlib.ExitStack() as stack:
            if self.is_active:
                self._writer = stack.enter_context(self._open_writer(step + 1))
            disable = None if self.is_active else True  # None: where stderr is no terminal
            self._bar = stack.enter_context(
                tqdm(initial=step, total=steps, unit="step", dynamic_ncols=True, disable=disable)
            )
            self.restart_clock()
            yield

    @contextlib.contextmanager
    def _open_writer(self, purge_step: int) -> Iterator[SummaryWriter]:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.run.tensorboard), purge_step=purge_step)
        try:
            yield writer
        finally:
            with contextlib.suppress(OSError):  # the disk is full: training is over, or has raised the error already
                writer.close()

    def advance(self) -> None:
        """Move the progress bar by a step."""
        self._bar.update()

    def restart_clock(self) -> None:
        """Measure images per second from now on, so that the time of a validation or a checkpoint does not count."""
        self._clock = time.perf_counter()

    def log_losses(self, step: int, losses: Sequence[float], learning_rate: float, best_miou: float | None) -> None:
        """Log the mean loss, the learning rate and the images per second of the steps since the last call.

        Args:
            step: the last of the steps.
            losses: the loss of each step.
            learning_rate: the highest of the last step.
            best_miou: for the progress bar; None before the first validation.

        Raises:
            OSError: the log or TensorBoard's file cannot be written.
        """
        now = time.perf_counter()
        values = {
            "loss": sum(losses) / len(losses),
            "lr": learning_rate,
            "images_per_second": len(losses) * self.batch_size / (now - self._clock),
        }
        self._clock = now
        if self._writer is not None:
            self.run.write_log({"step": step, **values})
            for name, value in values.items():
                self._writer.add_scalar(f"train/{name}", value, step)
        shown = {"loss": f"{values['loss']:.4f}", "lr": f"{values['lr']:.2e}"}
        if best_miou is not None:
            shown["best mIoU"] = f"{best_miou:.4f}"
        if self._bar.disable:
            left = tqdm.format_interval((self._steps - step) * self.batch_size / values["images_per_second"])
            figures = ", ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"step {step} of {self._steps}: {figures}, about {left} left")
        self._bar.set_postfix(shown, refresh=False)

    def log_validation(self, step: int, confusion: ConfusionMatrix) -> None:
        """Log the mean IoU and the mean accuracy of a validation, and the IoU of each class.

        Raises:
            OSError: the log or TensorBoard's file cannot be written.
        """
        if self._writer is None:
            return
        scores = {"mIoU": confusion.mean_iou, "mean accuracy": confusion.mean_accuracy}
        self.run.write_log({"step": step, **scores})
        for name, value in scores.items():
            self._writer.add_scalar(f"val/{name}", value, step)
        for index, value in enumerate(confusion.iou.tolist()):
            self._writer.add_scalar(f"val IoU/{class_name(confusion.id2label, index)}", value, step)

    def add_picture(self, step: int, index: int, picture: NDArray[np.uint8]) -> None:
        """Add the picture of a validation image, (H, W, 3), to TensorBoard's file."""
        if self._writer is not None:
            self._writer.add_image(f"photo, truth, prediction/{index}", picture, step, dataformats="HWC")


def compare_labels(sample: Sample, prediction: NDArray[np.integer], confusion: ConfusionMatrix) -> NDArray[np.uint8]:
    """Return three pictures side by side: the photo, the photo under its true classes, and under the predicted classes.

    Args:
        sample: the photo and its true classes.
        prediction: the predicted classes, (H, W).
        confusion: has the names of the classes and the ignored label, whose pixels are black.

    Returns:
        (height, width, 3); the longer side of each picture is at most 512.
    """
    photo = sample.image
    if not isinstance(photo, Image.Image):  # the first three of many channels, or the first of two
        photo = Image.fromarray(photo[..., :3] if photo.shape[2] >= 3 else photo[..., 0]).convert("RGB")
    palette = np.concatenate([class_palette(confusion.id2label), np.zeros((1, 3), dtype=np.uint8)])
    truth = np.where(sample.label == confusion.ignore_index, len(palette) - 1, sample.label.astype(np.int64))
    shown = [(truth, 0.0), (truth, 0.6), (prediction, 0.6)]
    return np.concatenate(
        [np.asarray(blend(photo, labels, palette, alpha, max_side=512)) for labels, alpha in shown], axis=1
    )
