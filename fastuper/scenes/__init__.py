"""Generated street scenes, and the small model trained on them."""

from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False  # type checkers take the name for `typing.TYPE_CHECKING`, whose import costs time
if TYPE_CHECKING:
    from fastuper.scenes.dataset import ID2LABEL, MODEL, PALETTE, SceneDataset, load_model, scene

__all__ = [
    "ID2LABEL",
    "MODEL",
    "PALETTE",
    "SceneDataset",
    "load_model",
    "scene",
]

if not TYPE_CHECKING:  # a type checker takes every name for one of a module that has __getattr__
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "ID2LABEL": "fastuper.scenes.dataset",
            "MODEL": "fastuper.scenes.dataset",
            "PALETTE": "fastuper.scenes.dataset",
            "SceneDataset": "fastuper.scenes.dataset",
            "load_model": "fastuper.scenes.dataset",
            "scene": "fastuper.scenes.dataset",
        },
    )
