"""The peers' names in results, tables and pictures: what draws them must not import what is timed."""

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
REFERENCE = ("reference", "reference, channels_last")
