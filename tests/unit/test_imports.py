"""The order of the rooms: which file may import which, in both packages, in bench and in tests."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fastuper
import fastuper_kernels

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels/fastuper_kernels", "fastuper", "bench", "tests")

# From the ground up. A module belongs to the longest entry that begins its name. It may import modules of its own entry
# and of the entries before it in this list. The entries "fastuper" and "fastuper_kernels" are for files that lie beside
# the package's `__init__`: a new folder needs an entry of its own.
ORDER = (
    "fastuper_kernels.dispatch",
    "fastuper_kernels.cpu",
    "fastuper_kernels.gpu",
    "fastuper_kernels.ops",
    "fastuper_kernels",
    "fastuper.io",
    "fastuper.weights",
    "fastuper.data",
    "fastuper.models.known_to_transformers",
    "fastuper.models.config_methods",
    "fastuper.models.configuration",
    "fastuper.models.outputs",
    "fastuper.models.untouched",
    "fastuper.models.norms",
    "fastuper.models.gradient_checkpointing",
    "fastuper.models.backbones.layers",
    "fastuper.models.necks",
    "fastuper.models.backbones",
    "fastuper.models.heads",
    "fastuper.models",
    "fastuper.scenes",
    "fastuper.inference",
    "fastuper.evaluation",
    "fastuper.recipes",
    "fastuper.training",
    "fastuper.patch",
    "fastuper.export",
    "fastuper.serve",
    "fastuper.cli",
    "fastuper",
    "bench",
    "tests",
)
# Packages that the kernels may import besides PyTorch, Triton and the standard library, only inside functions.
KERNELS_IN_FUNCTIONS = {"platformdirs", "rich", "typer"}
HEAVY = [
    "transformers",
    "torchvision",
    "matplotlib",
    "timm",
    "skimage",
    "accelerate",
    "scipy",
    "pandas",
    "gradio",
    "fastapi",
]


def modules() -> dict[str, Path]:
    """Return the files of both packages, of bench and of tests, by module name; a package's is its `__init__`."""
    found = {}
    for folder in FOLDERS:
        base = (ROOT / folder).parent
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Yield the names of the modules that a file imports, in functions too; not those under TYPE_CHECKING."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports here are absolute"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in MODULES else str(node.module)
        else:
            pending += ast.iter_child_nodes(node)


GRAPH = {name: sorted({target for target in imports(path) if target in MODULES}) for name, path in MODULES.items()}


def is_package(module: str) -> bool:
    return module in MODULES and MODULES[module].name == "__init__.py"


def room(module: str) -> int:
    """Return the place in ORDER of the entry that a module belongs to."""
    fitting = [entry for entry in ORDER if module == entry or module.startswith(f"{entry}.")]
    if fitting in (["fastuper"], ["fastuper_kernels"]) and module.count(".") > (0 if is_package(module) else 1):
        fitting = []
    assert fitting, f"{module} is in no room: give its folder a place in ORDER"
    return ORDER.index(max(fitting, key=len))


def test_imports_go_down_only():
    wrong = [
        f"{name} ({ORDER[room(name)]}) imports {target} ({ORDER[room(target)]})"
        for name, targets in GRAPH.items()
        for target in targets
        # An `__init__` may import the files of its own package, in any room.
        if room(target) > room(name) and not (is_package(name) and target.startswith(f"{name}."))
    ]
    assert wrong == []


def test_every_folder_has_a_place_in_the_order():
    assert {ORDER[room(name)] for name in MODULES} <= set(ORDER)
    with pytest.raises(AssertionError, match="in no room"):
        room("fastuper.attic.box")


def test_no_file_imports_a_package_that_it_is_in():
    wrong = [
        f"{name} imports {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if is_package(target) and name.startswith(f"{target}.")
    ]
    assert wrong == []


def test_no_circle_of_files():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_every_file_is_seen():
    assert {"fastuper.io.files", "fastuper.cli", "fastuper_kernels.gpu.tiles", "bench.run", __name__} <= MODULES.keys()
    assert sum(map(len, GRAPH.values())) > 300
    # An import inside a function counts; an import for the type checker does not.
    assert "fastuper_kernels.gpu.upsample_argmax" in GRAPH["fastuper_kernels.ops.upsample_argmax"]
    assert "fastuper.models.upernet_configuration" not in GRAPH["fastuper.models.heads.upernet"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import fastuper.cli", ["fastuper.cli"]),
        ("def run():\n    from fastuper.io import files", ["fastuper.io.files"]),
        ("from fastuper.io.files import read_json", ["fastuper.io.files"]),
        ("if TYPE_CHECKING:\n    import fastuper.cli\nelse:\n    import fastuper.io", ["fastuper.io"]),
    ],
)
def test_imports_are_found(source, expected, tmp_path):
    (tmp_path / "file.py").write_text(source)
    assert list(imports(tmp_path / "file.py")) == expected


def packages(path: Path, *, at_import: bool = False) -> set[str]:
    """Return the top-level packages that a file imports: anywhere, or only when the file itself is imported."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    found = set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
        if not (at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            pending += ast.iter_child_nodes(node)
    return found


def files(package: str) -> list[Path]:
    return [path for name, path in MODULES.items() if name.split(".")[0] == package]


def test_the_kernels_import_pytorch_and_triton():
    allowed = {"torch", "triton", "fastuper_kernels", *sys.stdlib_module_names}
    for path in files("fastuper_kernels"):
        assert packages(path, at_import=True) <= allowed, path
        assert packages(path) <= allowed | KERNELS_IN_FUNCTIONS, path


def test_the_networks_never_import_triton():
    for path in files("fastuper"):
        assert "triton" not in packages(path), path


def test_the_networks_do_import_the_kernels():
    assert any("fastuper_kernels" in packages(path) for path in files("fastuper"))


def environment() -> dict[str, str]:
    """Return the environment in which a new process imports these two packages."""
    folders = [str(Path(package.__file__).parent.parent) for package in (fastuper, fastuper_kernels)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize("package", ["fastuper", "fastuper_kernels"])
def test_importing_loads_only_what_is_needed(package):
    # With *, because both packages import their names at the first use.
    code = f"import sys; from {package} import *; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    loaded = done.stdout.split()
    assert {package, "torch"} <= set(loaded)
    assert [name for name in HEAVY if name in loaded] == []
    assert (package == "fastuper") is ("fastuper" in loaded)


@pytest.mark.parametrize("package", ["fastuper", "fastuper_kernels"])
def test_importing_a_package_does_not_load_torch(package):
    code = f"import sys, {package}; print('torch' in sys.modules, 'typing' in sys.modules)"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.split() == ["False", "False"]


LAZY = [name for name, path in MODULES.items() if is_package(name) and "= lazy_names(" in path.read_text()]


@pytest.mark.parametrize("package", LAZY)
def test_lazy_names_are_those_that_type_checkers_see(package):
    tree = ast.parse(MODULES[package].read_text(encoding="utf-8"))
    (seen,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = sorted(alias.name for node in seen.body for alias in node.names)
    module = importlib.import_module(package)
    assert sorted(module.__all__) == imported
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'absent'"):
        module.absent  # noqa: B018
    assert not any(
        isinstance(node, ast.Assign) and "__getattr__" in ast.unparse(node.targets[0]) for node in tree.body
    ), "a type checker would accept every name"


def test_the_rooms_have_lazy_names():
    assert {"fastuper", "fastuper.data", "fastuper.training", "fastuper.recipes", "fastuper_kernels"} <= set(LAZY)
