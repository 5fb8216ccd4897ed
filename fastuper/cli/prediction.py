"""Options of the commands that predict label maps; they become arguments of `fastuper.inference.Predictor`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fastuper.io.options import check_options, option


@dataclass(frozen=True)
class PredictionOptions:
    """Sizes, windows and views that a model predicts a label map from."""

    short_side: int | None = option(
        None,
        "Resize photos to this length of their shorter side, and keep their proportions.",
        at_least=1,
        default_text="the processor's size",
        metavar="N",
    )
    window: int | None = option(
        None,
        "Predict in windows of N x N pixels; without --short-side, photos then keep their own size.",
        at_least=1,
        default_text="whole photos",
        metavar="N",
    )
    stride: int | None = option(
        None,
        "Pixels from a window to the next.",
        at_least=1,
        default_text="two thirds of the window",
        metavar="N",
    )
    scales: str = option(
        "1", "Factors of the photo's size; the probabilities of all scales are averaged.", metavar="S,S,..."
    )
    flip: bool = option(False, "Predict each photo mirrored as well, and average.")
    batch_size: int = option(1, "Photos, or windows of photos, in one forward pass.", at_least=1, metavar="N")

    def __post_init__(self) -> None:
        check_options(self)
        self._factors()
        if self.stride is not None and (self.window is None or self.stride > self.window):
            raise ValueError(f"--stride {self.stride}: give a --window that is at least as large")

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `Predictor` and of `evaluate`."""
        return {**dataclasses.asdict(self), "scales": self._factors()}

    def _factors(self) -> tuple[float, ...]:
        try:
            factors = tuple(float(factor) for factor in self.scales.split(","))
        except ValueError:
            factors = (math.nan,)
        if not all(0 < factor < math.inf for factor in factors):
            raise ValueError(f"--scales {self.scales}: give numbers above 0, separated by commas, such as 0.5,0.75,1")
        return factors
