"""An exported model for several files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastuper.export import export_model
from fastuper.scenes import MODEL


@pytest.fixture(scope="session")
def exported_onnx(tmp_path_factory) -> Path:
    """Return the folder of the package's model, exported to ONNX."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export_model(MODEL, folder, format="onnx", check=False)
    return folder
