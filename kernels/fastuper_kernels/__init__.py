"""The operations UPerNet is made of. Imports torch, and never fastuper."""

from fastuper_kernels.conv_bn_relu import conv_bn_relu
from fastuper_kernels.fold_norm import fold_norm
from fastuper_kernels.linear import linear
from fastuper_kernels.pool_conv_bn_relu import pool_conv_bn_relu
from fastuper_kernels.pyramid_pool import pyramid_pool
from fastuper_kernels.upsample_add import upsample_add
from fastuper_kernels.upsample_argmax import upsample_argmax
from fastuper_kernels.upsample_cross_entropy import upsample_cross_entropy
from fastuper_kernels.upsampled_conv3x3 import upsampled_conv3x3

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
