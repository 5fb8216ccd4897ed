"""The operations UPerNet is made of. Imports torch, and never fastuper."""

from fastuper_kernels.linear import linear
from fastuper_kernels.upsample_add import upsample_add
from fastuper_kernels.upsample_argmax import upsample_argmax

__all__ = ["linear", "upsample_add", "upsample_argmax"]
