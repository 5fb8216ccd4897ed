"""Names in the results, which tables and plots use without importing the timed libraries."""

from __future__ import annotations

FASTUPER = "fastuper"
OURS_COMPILED = "fastuper, compiled"
SMALLER = "fastuper, at 1024"
CONVOLUTION = "one convolution"
EAGER = ("Transformers", "Transformers, channels_last")
WITHOUT_AUXILIARY = ("Transformers, no auxiliary head", "Transformers, no auxiliary head, channels_last")
AUTOCAST = "Transformers, autocast, channels_last"
COMPILED = "Transformers, compiled"
FROZEN = "Transformers, compiled, freezing"
TUNED = "Transformers, compiled, max-autotune, freezing"
SMP = ("segmentation_models_pytorch", "segmentation_models_pytorch, compiled, freezing")
ONNX = "ONNX Runtime"
OPENVINO = "OpenVINO"
PYTORCH = ("PyTorch", "PyTorch, compiled")
REFERENCE = ("reference", "reference, channels_last")
# Unified Perceptual Parsing: the network as papers write it, in PyTorch's modules; and less work by fastuper.
TEXTBOOK = ("textbook", "textbook, channels_last")
OBJECTS = "fastuper, objects alone"
SEGMENTATION = "fastuper, UperNetForSemanticSegmentation"

# A model of another library, as it is and after `fastuper.accelerate`.
BEFORE = ("before", "before, channels_last")
ACCELERATED = "accelerated"

# The reason why a peer is skipped that `--peers` left out.
NOT_SELECTED = "not asked for"
