"""The operations UPerNet is made of. Imports torch, and never fastuper."""

from fastuper_kernels.cpu.linear import linear
from fastuper_kernels.ops.conv_bn_relu import conv_bn_relu
from fastuper_kernels.ops.fold_norm import fold_norm
from fastuper_kernels.ops.pool_conv_bn_relu import pool_conv_bn_relu
from fastuper_kernels.ops.pyramid_pool import pyramid_pool
from fastuper_kernels.ops.upsample_add import upsample_add
from fastuper_kernels.ops.upsample_argmax import upsample_argmax
from fastuper_kernels.ops.upsample_cross_entropy import upsample_cross_entropy
from fastuper_kernels.ops.upsampled_conv3x3 import upsampled_conv3x3

__all__ = [
    "conv_bn_relu",
    "fold_norm",
    "linear",
    "pool_conv_bn_relu",
    "pyramid_pool",
    "upsample_add",
    "upsample_argmax",
    "upsample_cross_entropy",
    "upsampled_conv3x3",
]
