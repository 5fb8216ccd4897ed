"""Reading other libraries' checkpoints: files with classes, several state dicts, configuration texts, and folders."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import functools
import os
import pathlib
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastuper.weights.checkpoints import read_source
from fastuper.weights.config_text import Unread, read_config_text
from fastuper.weights.conversion import Choices
from fastuper.weights.errors import CheckpointError
from fastuper.weights.stand_ins import Inert
from tests.weights.common import assert_same

TENSORS = {"backbone.a": torch.arange(4.0), "decode_head.b": torch.ones(2, 2)}
AVERAGED = {name: tensor + 1 for name, tensor in TENSORS.items()}
TEXT = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(type='EncoderDecoder', backbone=dict(depths=[2, 2], eps=-1e-5), decode_head=dict(norm_cfg=norm_cfg))
"""


LIBRARIES = {
    "mmengine.logging.history_buffer": """
import numpy as np

class HistoryBuffer:
    def __init__(self):
        self._log_history, self._statistics_methods = np.array([1.5, 2.5]), {"mean": HistoryBuffer.mean}

    def mean(self):
        return self._log_history.mean()
""",
    "yacs.config": "class CfgNode(dict): pass",
    "mmengine.utils": "def run(*arguments): ran.append(arguments)",
    "mmcv.runner": "def run(*arguments): ran.append(arguments)",
}
"""Modules of libraries that are not installed here, as far as pickles name them."""


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Install the modules of `LIBRARIES`."""
    before = set(sys.modules)
    for name, code in LIBRARIES.items():
        for module in (name.split(".")[0], name.rpartition(".")[0], name):
            sys.modules.setdefault(module, types.ModuleType(module))
        exec(code, vars(sys.modules[name]))
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_what_runners_and_scripts_write_is_read_without_its_classes(tmp_path, zipped):
    def save(name: str, **content: Any) -> Path:
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
        return tmp_path / name

    with libraries():
        node = sys.modules["yacs.config"].CfgNode
        config = node(MODEL=node(SWIN=node(NUM_HEADS=[3, 6])), SEED=np.float64(1))
        config.frozen = True
        of_script = save("script.pth", model=TENSORS, config=config, args=argparse.Namespace(lr=0.1))
        path = save(
            "epoch_1.pth",
            meta={"cfg": TEXT, "dataset_meta": {"CLASSES": ("wall", "sky"), "palette": [[1, 2, 3], (4, 5, 255)]}},
            state_dict=collections.OrderedDict(TENSORS),
            message_hub={
                "log_scalars": {"loss": sys.modules["mmengine.logging.history_buffer"].HistoryBuffer()},
                "runtime_info": {"a": np.arange(3), "b": np.int64(3)},
            },
            config=config,
            more=[collections.deque([1, 2]), collections.defaultdict(list, a=[1]), datetime.datetime(2024, 1, 1)],
        )
    source = read_source(path)
    assert_same(TENSORS, dict(source.tensors))
    assert source.settings["model"]["backbone"] == {"depths": [2, 2], "eps": -1e-5}
    assert source.settings["model"]["decode_head"]["norm_cfg"] == {"type": "SyncBN", "requires_grad": True}
    assert (source.classes, source.palette) == (("wall", "sky"), ((1, 2, 3), (4, 5, 255)))
    assert (source.place, source.notes) == (str(path), ())
    assert "mmengine" not in sys.modules

    source = read_source(of_script)
    assert source.settings["MODEL"]["SWIN"]["NUM_HEADS"] == [3, 6]
    assert isinstance(source.settings["SEED"], Inert)
    path = save("arguments.pth", model=TENSORS, args=argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("/data")))
    assert read_source(path).settings["lr"] == 0.1


def test_a_text_that_changes_other_files_is_not_read(tmp_path):
    torch.save({"meta": {"cfg": "_base_ = ['swin.py']\n" + TEXT}, "state_dict": TENSORS}, tmp_path / "x.pth")
    source = read_source(tmp_path / "x.pth")
    assert source.settings == {}
    assert "it changes other files (_base_)" in source.notes[0]


class Call:
    """A pickle that calls a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced

    def __call__(self) -> None:
        """Pickles take only what can be called for the function of a call."""


CODE = {
    "eval": lambda trap: Call(eval, f"open({str(trap)!r}, 'w')"),
    "exec": lambda trap: Call(exec, f"open({str(trap)!r}, 'w')"),
    "os": lambda trap: Call(os.system, f"touch {trap}"),
    "subprocess": lambda trap: Call(subprocess.Popen, ["touch", str(trap)]),
    "open": lambda trap: Call(open, str(trap), "w"),
    "a method": lambda trap: Call(Call(getattr, trap, "touch")),
    "a function of functools": lambda trap: Call(functools.partial, trap.touch),
    "loading another file": lambda trap: Call(torch.load, str(trap)),
    "an import": lambda trap: Call(__import__, "os"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("code", CODE)
def test_code_is_refused_and_does_not_run(tmp_path, code, zipped):
    trap, path = tmp_path / "it ran", tmp_path / "a.pth"
    content = {"state_dict": TENSORS, "meta": {"cfg": CODE[code](trap)}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"a\.pth contains code that would run .*; it was not run") as caught:
        read_source(path)
    assert "\n" not in str(caught.value)
    assert not trap.exists()


def test_a_few_bytes_that_ask_for_all_memory_are_refused(tmp_path):
    torch.save({"model": TENSORS, "x": Call(bytearray, 10**15)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth contains code .*bytearray is not allowed\); it was not run"):
        read_source(tmp_path / "a.pth")
    traps: list[Any] = [[0] * 10]
    for _ in range(30):
        traps.append([traps[-1]] * 10)
    endless: list[Any] = []
    endless.append(endless)
    for trap, reason in ((traps, "more than"), (endless, "nested more than"), (1 << 1000, "an integer beyond")):
        torch.save({"model": TENSORS, "args": {"depths": trap}}, tmp_path / "a.pth")
        source = read_source(tmp_path / "a.pth")
        assert source.settings == {}
        assert f"its configuration, args, is not read: {reason}" in source.notes[0]


@pytest.mark.parametrize("module", ["mmengine.utils", "mmcv.runner"])
def test_a_function_under_a_librarys_name_does_not_run(tmp_path, module):
    """Names of data are replaced, never looked up: a file may name any function there."""
    ran: list[Any] = []
    with libraries():
        vars(sys.modules[module])["ran"] = ran
        torch.save({"model": TENSORS, "x": Call(sys.modules[module].run, "rm")}, tmp_path / "a.pth")
        source = read_source(tmp_path / "a.pth")  # the function is there to be called
        assert_same(TENSORS, dict(source.tensors))
        assert ran == []
        torch.load(tmp_path / "a.pth", weights_only=False)
        assert ran == [("rm",)]


# State dicts ----------------------------------------------------------------------------------------------------------


def under(prefix: str, tensors: dict[str, torch.Tensor] = TENSORS, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**{prefix + name: tensor for name, tensor in tensors.items()}, **more}


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
CHOSEN: dict[str, tuple[Any, str | None, str]] = {
    "the file itself": (TENSORS, None, ""),
    "state_dict": ({"state_dict": TENSORS, "optimizer": OPTIMIZER, "epoch": 3}, None, ""),
    "model": ({"model": TENSORS, "epoch": 3}, None, ""),
    "plain before averaged": (
        {"state_dict_ema": AVERAGED, "state_dict": TENSORS},
        None,
        "weights of state_dict; the file also has state_dict_ema: --weights-key chooses",
    ),
    "model before model_ema": ({"model_ema": AVERAGED, "model": TENSORS}, None, "the file also has model_ema"),
    "EMAHook": (
        {"ema_state_dict": under("module.", AVERAGED, steps=torch.tensor(9)), "state_dict": TENSORS},
        None,
        "weights of state_dict (mmengine's EMAHook writes the averaged weights as state_dict)",
    ),
    "averaged alone": ({"model_ema": TENSORS}, None, ""),
    "another name": ({"generator": TENSORS, "epoch": 1}, None, ""),
    "the key": ({"state_dict": AVERAGED, "ema_state_dict": TENSORS}, "ema_state_dict", ""),
    "a key inside": ({"a": {"b": TENSORS}}, "a.b", ""),
    "module.": ({"state_dict": under("module.")}, None, "all names begin with 'module.'"),
    "both wrappers": (under("module._orig_mod."), None, "all names begin with 'module._orig_mod.'"),
    "Lightning": ({"state_dict": under("model.")}, None, "all names begin with 'model.'"),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_the_state_dict_that_is_taken(tmp_path, case):
    content, key, note = CHOSEN[case]
    torch.save(content, tmp_path / "a.pt")
    source = read_source(tmp_path / "a.pt", key)
    assert_same(TENSORS, dict(source.tensors))
    assert note in "; ".join(source.notes)
    assert bool(note) == bool(source.notes)


def test_a_counter_beside_averaged_weights_is_listed(tmp_path):
    torch.save({"ema_state_dict": under("module.", steps=torch.tensor(9))}, tmp_path / "a.pth")
    source = read_source(tmp_path / "a.pth")
    assert_same(TENSORS, dict(source.tensors))
    assert [(row.source, row.targets) for row in source.left_out] == [("steps", ())]


NO_STATE_DICT: dict[str, tuple[Any, str | None, str]] = {
    "an optimizer": (OPTIMIZER, None, "holds the state of an optimizer and no weights"),
    "an optimizer in a run's file": ({"optimizer": OPTIMIZER, "epoch": 3}, None, "the state of an optimizer and no"),
    "nothing": ({}, None, "has no weights: no state dict under state_dict, model or another name; it has none"),
    "numbers": ({"epoch": 3}, None, "it has epoch"),
    "a list": ([torch.zeros(2)], None, "holds a list, not a dict of tensors"),
    "two of unknown names": ({"a": TENSORS, "b": TENSORS}, None, r"has 2 state dicts \(a, b\); choose by the weights"),
    "arrays of NumPy": (
        {"model": {"a": np.zeros(2)}},
        None,
        "its model is no state dict: 'a' is of another library's class; it must map names to tensors of PyTorch",
    ),
    "a number among tensors": ({"model": TENSORS | {"c": 3}}, None, "its model is no state dict: 'c' is of type int"),
    "a state dict inside": ({"model": {"b": TENSORS}}, None, "choose the one inside it by the weights key model.b"),
    "no such key": ({"model": TENSORS}, "model_ema", "has no state dict 'model_ema'; its state dicts: model"),
    "a key of something else": ({"model": TENSORS, "epoch": 3}, "epoch", "'epoch' is no state dict"),
    "a sparse tensor": ({"model": {"a": torch.eye(2).to_sparse()}}, None, "'a' is sparse, quantised or without"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("case", NO_STATE_DICT)
def test_files_without_a_state_dict(tmp_path, case):
    content, key, message = NO_STATE_DICT[case]
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_source(tmp_path / "a.pth", key)
    assert str(tmp_path / "a.pth") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        read_source(tmp_path / "nowhere.pth")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(CheckpointError, match="is no weight file: its name ends with none of"):
        read_source(tmp_path / "photo.jpg")
    torch.save({"model": TENSORS}, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_source(tmp_path / "a.pth")
    save_file(TENSORS, tmp_path / "a.safetensors")
    assert_same(TENSORS, dict(read_source(tmp_path / "a.safetensors").tensors))
    with pytest.raises(CheckpointError, match="has one state dict; leave out the weights key 'model'"):
        read_source(tmp_path / "a.safetensors", "model")


def test_classes_and_colours(tmp_path):
    def read(**meta: Any) -> Any:
        torch.save({"meta": meta, "state_dict": TENSORS}, tmp_path / "a.pth")
        source = read_source(tmp_path / "a.pth")
        return source.classes, source.palette, "; ".join(source.notes)

    assert read(CLASSES=["a"], PALETTE=[[0, 1, 2]], config=TEXT) == (("a",), ((0, 1, 2),), "")
    assert read(CLASSES=None) == (None, None, "")
    assert read(CLASSES=[1])[::2] == (None, "the names of its classes are no list of texts, and are not read")
    assert read(PALETTE=np.zeros((2, 3)))[1:] == (None, "its palette is no list of three numbers each, and is not read")
    assert read(CLASSES=["a"], PALETTE=[[0, 1, 2]] * 2)[1:] == (
        None,
        "it has 1 names of classes and 2 colours: the colours are not read",
    )
    assert "its configuration, meta['cfg'], is not read: no Python (line 1: " in read(cfg="model = dict(")[2]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_pickles_that_pytorch_does_not_read(tmp_path, zipped, recwarn):
    torch.save(TENSORS, tmp_path / "a.pth", pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"a\.pth is a pickle of protocol 4, .*; save the model's state_dict\(\)"):
        read_source(tmp_path / "a.pth")
    assert not recwarn.list


def test_a_program_of_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/data.pkl", "a/code/__torch__.py", "a/constants.pkl"):
            archive.writestr(name, b"")
    with pytest.raises(CheckpointError, match=r"a\.pt is a program of TorchScript, which is not run; save the state"):
        read_source(tmp_path / "a.pt")


def test_a_mapping_whose_methods_are_replaced_is_refused(tmp_path):
    content = collections.OrderedDict(model=TENSORS)
    content.get = 3  # type: ignore[assignment, method-assign]
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth holds objects of another form than a checkpoint's"):
        read_source(tmp_path / "a.pth")


# Folders --------------------------------------------------------------------------------------------------------------


def test_the_last_checkpoint_of_a_working_folder(tmp_path):
    for number in (2, 10):
        torch.save({"state_dict": {"a": torch.tensor([float(number)])}}, tmp_path / f"iter_{number}.pth")
    (tmp_path / "config.py").touch()
    source = read_source(tmp_path)
    assert source.tensors["a"] == 10
    assert source.notes == (f"{tmp_path} has 2 checkpoints; taking the latest, iter_10.pth",)
    (tmp_path / "last_checkpoint").write_text("/home/someone/work_dirs/run/iter_2.pth\n")
    source = read_source(tmp_path)
    assert source.tensors["a"] == 2
    assert "taking iter_2.pth, which its last_checkpoint names" in source.notes[0]
    (tmp_path / "last_checkpoint").unlink()
    torch.save(TENSORS, tmp_path / "best.pth")
    assert read_source(tmp_path).tensors["a"] == 10
    torch.save(TENSORS, tmp_path / "epoch_1.pth")
    with pytest.raises(CheckpointError, match=r"has 4 checkpoints \(best\.pth, .*\); give the file to read"):
        read_source(tmp_path)


def test_folders_of_one_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no checkpoint: no file that ends with \.safetensors"):
        read_source(tmp_path)
    torch.save(TENSORS, tmp_path / "anything.pt")
    assert_same(TENSORS, dict(read_source(tmp_path).tensors))
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    save_file(AVERAGED, tmp_path / "model.safetensors")
    source = read_source(tmp_path)
    assert_same(AVERAGED, dict(source.tensors))
    assert source.settings == {"architecture": "resnet18"}


# Texts of configurations ----------------------------------------------------------------------------------------------


def test_literals_are_read_and_nothing_is_evaluated(tmp_path):
    trap = tmp_path / "it ran"
    values = read_config_text(
        f"""
import os
_base_ = ['a.py']
size = (512, 512)
base = dict(a=1, b=None)
model = dict(size=size, crop=size, **base, scales=[2 * 3, 1 / 2, -1.5, +2, 7 // 2], text='x' 'y', on=True)
dotted = dict({{'a.b': dict(x=1)}}, c=2)
other: int = {{'k': [dict()], 3: 4}}
x = open({str(trap)!r}, 'w')
y = dict(a=os.system('touch {trap}'), b=2, c=[undefined, 1 / 0, 9 ** 9 ** 9, 'a' * 10 ** 10])
z = dict([('a', 1)])
size[0], w = 3, 4
for i in [1]: v = i
def f(): pass
"""
    )
    assert values["model"] == {
        "size": (512, 512),
        "crop": (512, 512),
        "a": 1,
        "b": None,
        "scales": [6, 0.5, -1.5, 2, 3],
        "text": "xy",
        "on": True,
    }
    assert values["dotted"] == {"a.b": {"x": 1}, "c": 2}
    assert values["other"] == {"k": [{}], 3: 4}
    assert values["y"]["b"] == 2
    for unread in (values["x"], values["y"]["a"], *values["y"]["c"], values["z"]):
        assert isinstance(unread, Unread)
    assert not {"v", "w", "f"} & values.keys()
    assert not trap.exists()
    for use in (bool, list, len, int, lambda value: value == 3, lambda value: value["a"], lambda value: 3 in value):
        with pytest.raises(CheckpointError, match="has 'undefined' where a value is expected, and only literals are"):
            use(values["y"]["c"][0])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = [0, 0]\n" + "a = [a, a]\n" * 60, "more than 1048576 values"),
        ("a = {}\n" + "a = [a]\n" * 2000, "nested more than 100 deep"),
        ("a = -0x" + "F" * 100_000, "an integer beyond"),
        ("a = f'" + "{1}" * 300_000 + "'", "more than 20000 braces"),
    ],
)
def test_texts_that_are_traps(text, reason):
    with pytest.raises(CheckpointError, match=reason):
        read_config_text(text)


def test_an_expression_that_is_no_literal_is_named_by_its_first_line():
    values = read_config_text("a = 9999999\n" + "a = a * a\n" * 40 + "b = 'ä', f(\n1)\nc = f'" + "{1}" * 1000 + "'")
    assert (values["a"].text, values["b"][1].text) == ("a * a", "f(")
    assert len(values["c"].text) == 1000


@pytest.mark.parametrize("text", ["a = (", "a\0", "(" * 5000, "a = " + "-" * 100_000 + "1", "x" * (5 * 2**20)])
def test_texts_that_are_no_configuration(text):
    with pytest.raises(CheckpointError, match=r"no Python|no configuration"):
        read_config_text(text)


def test_a_value_that_is_no_literal_needs_an_option():
    unread = read_config_text("a = f()")["a"]
    with pytest.raises(ValueError, match=r"the checkpoint's num_heads is 'f\(\)', which is no literal; give num_heads"):
        Choices().settle("num_heads", unread, None)
    assert Choices({"num_heads": (1, 2)}).settle("num_heads", unread, None) == [1, 2]


def test_choices():
    with pytest.raises(ValueError, match=r"a conversion has no option heads; its options are num_heads, "):
        Choices({"heads": 3})
    with pytest.raises(ValueError, match=r"num_heads must be integers, one or a list, got 'three'"):
        Choices({"num_heads": "three"})
    with pytest.raises(ValueError, match="align_corners must be True or False, got 1"):
        Choices({"align_corners": 1})
    with pytest.raises(ValueError, match="resnet_style must be pytorch or caffe, got 'tf'"):
        Choices({"resnet_style": "tf"})
    choices = Choices({"num_heads": 3, "mean": [1.0, 2.5], "std": None})
    with pytest.raises(
        ValueError, match=r"num_heads=\[3\] contradicts the checkpoint, which has \[3, 6\]; leave it out"
    ):
        choices.settle("num_heads", (3, 6), None)
    assert choices.unused() == ["mean"]
    assert choices.settle("mean", None, (0.0, 0.0)) == [1.0, 2.5]
    assert choices.settle("std", None, (57.12000001, 1.0)) == [57.12000001, 1.0]
    assert choices.notes == ["mean: 1, 2.5 (as given)", "std: 57.12, 1 (the default; the checkpoint does not say)"]
    with pytest.raises(ValueError, match="does not say its stride of each stage; give strides"):
        choices.settle("strides", None, None)
