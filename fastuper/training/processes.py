"""The processes of a training run: Accelerate's `Accelerator`, set up only for data parallelism."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from torch import nn

from fastuper.models.backbones import Backbone

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(model: nn.Module, cpu: bool) -> Accelerator:
    """Return the accelerator that distributes the steps of a model.

    Args:
        model: a UPerNet, which decides whether some parameters may have no gradient.
        cpu: whether to use the CPU even where there is a GPU.

    Raises:
        ImportError: Accelerate or TensorBoard is missing; the message names the extra.
        ValueError: Accelerate is configured for a parallelism other than data parallelism.
    """
    missing = [name for name in ("accelerate", "tensorboard") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"training needs {' and '.join(missing)}: pip install 'fastuper[train]'")
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import GradientAccumulationPlugin

    # Our backbones use all of their parameters, up to the last map. Backbones of other libraries may have parameters
    # without a gradient.
    backbone = model.backbone
    all_used = isinstance(backbone, Backbone) and backbone.out_features[-1] == backbone.stage_names[-1]
    # All settings are explicit: the environment (ACCELERATE_MIXED_PRECISION and others) must not change a step.
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not all_used)],
    )
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(
            f"Accelerate is configured for {kind}, and training here is data parallel only: choose no {kind} in "
            "`accelerate config`, or give `accelerate launch --multi_gpu`"
        )
    return accelerator
