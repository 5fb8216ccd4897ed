"""UPerNet for semantic segmentation, the same network as Hugging Face Transformers' with less work."""

__version__ = "0.1.0"
