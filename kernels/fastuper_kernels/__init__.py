"""The operations of UPerNet, each with a CPU way and a Triton kernel."""

from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False  # as in `typing`, whose import would take longer than the rest of this file
if TYPE_CHECKING:
    from fastuper_kernels.ops.conv_bn_relu import conv_bn_relu
    from fastuper_kernels.ops.fold_norm import fold_norm
    from fastuper_kernels.ops.linear import linear
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

# An operation's file in `ops` has the operation's name.
if not TYPE_CHECKING:  # a type checker takes every name for one of a module that has __getattr__
    __getattr__, __dir__ = lazy_names(__name__, {name: f"fastuper_kernels.ops.{name}" for name in __all__})
