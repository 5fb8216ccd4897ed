"""The class names of the model that the tests of the command line use."""

from __future__ import annotations

NAMES = {0: "sky", 1: "façade", 2: "道路", 3: "tree", 4: "person", 5: "water"}
