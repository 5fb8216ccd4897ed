"""Exports: a model for another runtime, proved to give the same results there."""

from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fastuper.export.exporting import export_model
    from fastuper.export.settings import ExportError, ExportSettings, ProofError

__all__ = ["ExportError", "ExportSettings", "ProofError", "export_model"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "ExportError": "fastuper.export.settings",
            "ExportSettings": "fastuper.export.settings",
            "ProofError": "fastuper.export.settings",
            "export_model": "fastuper.export.exporting",
        },
    )
