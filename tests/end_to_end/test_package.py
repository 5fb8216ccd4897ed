"""The wheel: its files, and its work where no other part of the project is installed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built from a copy of the tracked files as for a release."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_has_two_packages_and_no_other_file(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert roots == {"fastuper", "fastuper_kernels", f"fastuper-{wheel.name.split('-')[1]}.dist-info"}
    model = [f"fastuper/scenes/model/{name}.json" for name in ("config", "preprocessor_config")]
    model.append("fastuper/scenes/model/model.safetensors")
    tables = [f"fastuper/data/{name}.json" for name in ("ade20k", "parsing_labels")]
    for file in ("fastuper/py.typed", "fastuper_kernels/py.typed", *tables, *model):
        assert file in names
    tracked = {
        str(path.relative_to(root))
        for root, package in ((ROOT, "fastuper"), (ROOT / "kernels", "fastuper_kernels"))
        for path in (root / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert tracked <= set(names)


@pytest.mark.slow
def test_wheel_works_installed_alone(wheel: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*install, str(wheel)], check=True)
    # -I excludes the working tree and the paths of an editable installation; dependencies come from this environment.
    program = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
sys.path = [p for p in sys.path if {str(ROOT)!r} not in p or "site-packages" in p]
sys.path.insert(0, {str(tmp_path / "site")!r})
import fastuper, fastuper_kernels, torch
assert fastuper.__file__.startswith({str(tmp_path)!r}), fastuper.__file__
assert fastuper_kernels.__file__.startswith({str(tmp_path)!r}), fastuper_kernels.__file__
config = fastuper.UperNetConfig(
    backbone_config=fastuper.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]), hidden_size=8
)
model = fastuper.UperNetForSemanticSegmentation(config).eval()
model.save_pretrained({str(tmp_path / "model")!r})
again = fastuper.UperNetForSemanticSegmentation.from_pretrained({str(tmp_path / "model")!r})
x = torch.rand(1, 3, 40, 50)
assert torch.equal(model(x).logits, again(x).logits)
from fastuper.scenes import load_model, scene
network, processor = load_model()
picture, truth = scene(0)
(labels,) = network.segment(**processor(images=picture, return_tensors="pt"))
assert (labels.numpy() == truth).mean() > 0.8
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-I", "-c", program], check=True, cwd=tmp_path, env=environment)
    script = tmp_path / "site" / "bin" / "fastuper"
    assert "fastuper.cli" in script.read_text()
