"""The configuration that a convolution takes on a GPU, tested without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastuper_kernels.dispatch import choices
from fastuper_kernels.dispatch.choices import CONV
from fastuper_kernels.gpu import configs
from fastuper_kernels.gpu.configs import ConvConfig, conv_config, conv_key, group_config, heuristic, tuned
from fastuper_kernels.tune import layers, text_lines, write
from tests.unit.test_imports import environment

CPU, NAME = torch.device("cpu"), "A GPU"


def image(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty((), dtype=dtype).expand(shape)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "has_tma", lambda device: True)
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 132)


@pytest.mark.usefixtures("hopper")
def test_the_heuristic_fills_the_gpu_and_splits_only_long_products() -> None:
    chosen = {}
    for layer in layers([512, 1024], [1, 8, 16]):
        x, rest = image(*layer.shape), layer[1:]
        config = chosen[layer] = heuristic(x, *rest)
        batch, channels, height, width = layer.shape
        split = config.split_of(channels, layer.taps, x.dtype)
        programs = split * config.tiles_of(batch, height, width, layer.channels_out, layer.taps)
        assert programs >= 96, (layer, config)
        assert split == 1 or config.steps_of(channels, layer.taps, x.dtype) // split >= 16
        assert config.way == "tma"
        assert not config.persistent
    assert {config.split for layer, config in chosen.items() if layer.taps == 1} == {1}
    largest = [config for layer, config in chosen.items() if layer.taps == 9 and layer.shape[2] >= 128]
    assert {(config.rows, config.columns, config.channels) for config in largest} == {(16, 16, 128)}


def test_a_gpu_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x = image(8, 512, 64, 64)
    monkeypatch.setattr(configs, "shared_memory", lambda device: 65536)
    config = heuristic(x, 512, 9, False)
    assert config.way == "pointers"
    assert config.stages * (config.rows * config.columns + config.channels) * config.depth < 65536
    group = group_config(x, 10**6)
    assert group.stages * (group.rows + group.channels) * group.depth < 65536
    monkeypatch.setattr(configs, "shared_memory", lambda device: 1024)
    assert heuristic(x, 512, 9, False) == configs.pointers_config(x, False) == ConvConfig("cudnn")


def test_no_more_stages_than_steps() -> None:
    config = ConvConfig("tma", split=4, stages=4)
    assert config.stages_of(512, 9, torch.bfloat16) == 4
    assert config.stages_of(96, 1, torch.bfloat16) == config.stages_of(8, 1, torch.float32) == 2


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return the package's file and the user's, for a GPU with the name `NAME`."""
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(configs, "user_file", lambda: tmp_path / "user.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)
    tuned.cache_clear()
    yield tmp_path / "shipped.json", tmp_path / "user.json"
    tuned.cache_clear()


def entry(**config: Any) -> dict[str, Any]:
    return {"config": configs.as_json(ConvConfig("pointers", **config)), "milliseconds": 1.0, "cudnn": 2.0}


def test_the_users_file_decides_and_on_several_ranks_the_packages(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda", 0)
    shipped, user = files
    write(shipped, NAME, {"a": entry(rows=2), "b": entry(rows=4)})
    write(user, NAME, {"a": entry(rows=8)})
    write(user, "another", {"b": entry(rows=16)})
    rows = {by_user: {key: value.rows for key, value in tuned(gpu, by_user).items()} for by_user in (0, 1)}
    assert rows == {0: {"a": 2, "b": 4}, 1: {"a": 8, "b": 4}}
    asked: list[bool] = []
    x = image(1, 64, 8, 8)
    found = {conv_key(x, 32, 9, False): ConvConfig("pointers", rows=4, stages=2)}
    monkeypatch.setattr(configs, "tuned", lambda device, by_user: asked.append(by_user) or found)
    assert conv_config(x, 32, 9, False) == ConvConfig("pointers", rows=4, stages=2)
    monkeypatch.setattr(choices.torch, "are_deterministic_algorithms_enabled", lambda: True)
    conv_config(x, 32, 9, False)
    assert asked == [True, False]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"A GPU": 1}', '{"A GPU": {"a": {"config": {"way": "tma", "depths": 3}}}}']
)
def test_a_malformed_file_is_ignored(text: str, files: tuple[Path, Path]) -> None:
    files[0].write_text(text, encoding="utf-8")
    assert tuned(torch.device("cuda", 0), True) == {}
    assert tuned(CPU, True) == {}


def test_show_prints_measurements_beside_cudnn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTUPER_CACHE", str(tmp_path))
    key = f"3x3 1x512x8x8 -> 512 bfloat16, scale on {NAME}"
    for _ in range(2):
        CONV(key, lambda: {}, clock=lambda functions: {"triton": [3e-3] * 5, "cudnn": [1e-3] * 5})
        CONV.forget()
    lines = list(text_lines())
    assert any("conv: triton | cudnn" in line for line in lines)
    assert any("cudnn: measured for 3x3 1x512x8x8" in line and "triton 3 ms" in line for line in lines), lines
    assert not any("linear" in line for line in lines)


def test_write_keeps_older_entries(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "tuned.json"
    write(path, NAME, {"a": 1})
    write(path, NAME, {"b": 2})
    write(path, "another", {"a": 3})
    assert json.loads(path.read_text()) == {NAME: {"a": 1, "b": 2}, "another": {"a": 3}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured")
def test_the_command_without_a_gpu(tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastuper_kernels.tune", *options]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)

    shown = run("--show")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("no GPU here")
    assert "triton | cudnn" in shown.stdout
    assert "winograd" not in shown.stdout
    failed = run("--output", str(tmp_path / "tuned.json"))
    assert (failed.returncode, failed.stderr) == (2, "Error: there is no GPU here to measure on\n")
    assert not list(tmp_path.iterdir())
