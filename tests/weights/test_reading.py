"""Reading weights: the files that are found, the errors of damaged files, and pickles that contain code."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
import tempfile
import types
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from fastuper.io.hub import HubOptions
from fastuper.weights.errors import CheckpointError
from fastuper.weights.reading import read_weights
from tests.weights.common import assert_same

TENSORS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "b.weight": torch.arange(4, dtype=torch.int64),
    "c.weight": torch.tensor(2.5, dtype=torch.bfloat16),
}


def write_shards(folder, names=("model", "safetensors"), weight_map=None):
    stem, extension = names
    files = {
        f"{stem}-00001-of-00002.{extension}": ["a.weight"],
        f"{stem}-00002-of-00002.{extension}": ["b.weight", "c.weight"],
    }
    for filename, keys in files.items():
        shard = {key: TENSORS[key] for key in keys}
        (save_file if extension == "safetensors" else torch.save)(shard, folder / filename)
    weight_map = weight_map or {key: filename for filename, keys in files.items() for key in keys}
    return json.dumps({"metadata": {}, "weight_map": weight_map})


def write(folder, name):
    """Write TENSORS to a file of this name; for an index also the shards that it names."""
    if name.endswith("safetensors"):
        save_file(TENSORS, folder / name)
    elif name.endswith("bin"):
        torch.save(TENSORS, folder / name)
    else:
        stem, extension = name.split(".")[:2]
        (folder / name).write_text(write_shards(folder, (stem, extension)))


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("model.safetensors.index.json", None),
        ("pytorch_model.bin", None),
        ("pytorch_model.bin.index.json", None),
        ("model.fp16.safetensors", "fp16"),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("pytorch_model.fp16.bin", "fp16"),
        ("pytorch_model.bin.index.fp16.json", "fp16"),
    ],
)
def test_read_weights(tmp_path, name, variant):
    write(tmp_path, name)
    tensors, files = read_weights(tmp_path, HubOptions(), variant)
    assert_same(TENSORS, tensors)
    suffix = ".safetensors" if "safetensors" in name else ".bin"
    assert sorted(files) == sorted(path for path in tmp_path.iterdir() if path.suffix == suffix)


def test_read_weights_of_a_subfolder(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "model.safetensors.index.json")
    assert_same(TENSORS, read_weights(tmp_path, HubOptions(subfolder="sub"))[0])


def test_read_weights_prefers_safetensors_and_single_files(tmp_path):
    order = ["pytorch_model.bin.index.json", "pytorch_model.bin", "model.safetensors.index.json", "model.safetensors"]
    for name in order:
        write(tmp_path, name)
        suffix = ".safetensors" if "safetensors" in name else ".bin"
        files = read_weights(tmp_path)[1]
        assert len(files) == (2 if name.endswith("json") else 1)
        assert {path.suffix for path in files} == {suffix}


def test_read_weights_of_the_old_pickle_format(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(TENSORS, read_weights(tmp_path)[0])


def test_read_weights_copies_the_tensors(tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors"):
        write(tmp_path, name)
        tensors, [file] = read_weights(tmp_path)
        with file.open("r+b") as stream:  # in place
            stream.write(b"\xff" * file.stat().st_size)
        assert_same(TENSORS, tensors)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read_weights(tmp_path, variant="fp16")
    assert str(caught.value) == (
        f"{tmp_path} has no weights: no file model.fp16.safetensors or model.safetensors.index.fp16.json or "
        "pytorch_model.fp16.bin or pytorch_model.bin.index.fp16.json; leave out variant="
    )
    with pytest.raises(CheckpointError, match=r"/sub has no weights: no file model\.safetensors or "):
        read_weights(tmp_path, HubOptions(subfolder="sub"))


def test_a_cache_without_weights(tmp_path):
    snapshot = tmp_path / "models--someone--upernet" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--someone--upernet" / "refs").mkdir()
    (tmp_path / "models--someone--upernet" / "refs" / "main").write_text("0" * 40)
    with pytest.raises(CheckpointError, match=r"someone/upernet has no weights: .*if the Hub was not reached"):
        read_weights("someone/upernet", HubOptions(cache_dir=tmp_path, local_files_only=True))


class Payload:
    """Creates a file when a reader unpickles it without checks."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def damaged(content, path):
    """Return the bytes of a weight file with this damage."""
    buffer = io.BytesIO()
    if path.suffix == ".safetensors":
        save_file(TENSORS, path)
        whole = path.read_bytes()
    else:
        torch.save(TENSORS, buffer)
        whole = buffer.getvalue()
    return {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "nine bytes": whole[:9],
        "zeros": bytes(len(whole)),
        "text": b"<html><body>404: not found</body></html>",
        "huge header": struct.pack("<Q", 1 << 62) + whole[8:],
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    }[content]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("empty", r"is empty; fetch it again"),
        ("truncated", r"is (truncated or )?damaged \(.+\); fetch it again"),
        ("nine bytes", r"is (truncated or )?damaged \(.+\); fetch it again"),
        ("zeros", r"is (truncated or )?damaged \(.+\); fetch it again"),
        ("text", r"is (truncated or )?damaged \(.+\); fetch it again"),
        ("huge header", r"is (truncated or )?damaged \(.+\); fetch it again"),
        ("lfs", r"is a git-lfs pointer, not the weights; run `git lfs pull`"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(damaged(content, path))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(tmp_path)
    assert str(caught.value).startswith(f"{path} is ")
    assert "\n" not in str(caught.value)


def file_bytes(kind):
    buffer = io.BytesIO()
    if kind == "safetensors":
        return save(TENSORS)
    torch.save(TENSORS, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old format"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_is_found_or_harmless(kind, data):
    """Changed bytes, or a missing end, raise no error but CheckpointError, with a message of one line."""
    content = bytearray(file_bytes(kind))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4), label="places"):
        content[place] = data.draw(st.integers(0, 255), label="byte")
    content = content[: data.draw(st.integers(0, len(content)), label="length")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
        path.write_bytes(content)
        try:
            read_weights(folder)
        except CheckpointError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "old format"])
def test_a_pickle_with_code_is_refused(tmp_path, new_format):
    trap = tmp_path / "it ran"
    content = {"decode_head.classifier.weight": torch.zeros(1), "payload": Payload(trap)}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"contains code that would.*it was not run\. .*safetensors") as caught:
        read_weights(tmp_path)
    assert "\n" not in str(caught.value)
    assert not trap.exists()


def test_a_pickle_of_an_unknown_class(tmp_path):
    module = types.ModuleType("somewhere")
    module.Thing = type("Thing", (), {"__module__": "somewhere"})
    sys.modules["somewhere"] = module
    try:
        torch.save({"thing": module.Thing()}, tmp_path / "pytorch_model.bin")
    finally:
        del sys.modules["somewhere"]
    with pytest.raises(CheckpointError, match=r"contains code that would run .*somewhere\.Thing.*it was not run"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"state_dict": {"a": torch.zeros(1)}}, torch.zeros(1)])
def test_a_pickle_of_another_value(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not hold a dict of tensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "is not valid JSON"),
        ("[]", "holds list"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "not a weight file beside it"),
        ('{"weight_map": {"a": "config.json"}}', "not a weight file beside it"),
        (
            '{"weight_map": {"a": "model-00001-of-00009.safetensors"}}',
            "model-00001-of-00009.safetensors', which is missing",
        ),
    ],
)
def test_a_bad_index(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(OSError, match=re.escape(message)) as caught:
        read_weights(tmp_path)
    assert str(tmp_path / "model.safetensors.index.json") in str(caught.value)


def test_an_index_that_lists_a_missing_tensor(tmp_path):
    shard = "model-00001-of-00002.safetensors"
    weight_map = {"a.weight": shard, "z.weight": shard}
    (tmp_path / "model.safetensors.index.json").write_text(write_shards(tmp_path, weight_map=weight_map))
    with pytest.raises(CheckpointError, match=r"00001-of-00002.safetensors lacks z\.weight, which its index"):
        read_weights(tmp_path)


@pytest.mark.parametrize("place", ["outside", "models--a--b/blobs"])
def test_shards_that_are_links(tmp_path, place):
    """An index may name links into the Hub's cache, and no other links out of its folder."""
    target = tmp_path / place / "shard"
    target.parent.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, target)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model-00001-of-00001.safetensors").symlink_to(target)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    if place == "outside":
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors\.index\.json names .*, a link out of its folder"
        ):
            read_weights(folder)
    else:
        assert read_weights(folder)[0]["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (torch.zeros(1).expand(2**40), "sparse, quantised or without values"),
        (torch.eye(3).to_sparse(), "sparse, quantised or without values"),
        (torch.zeros(3, device="meta"), "sparse, quantised or without values"),
    ],
    ids=["huge", "sparse", "meta"],
)
def test_a_pickle_of_tensors_that_are_not_stored_whole(tmp_path, value, fault):
    torch.save({"a": value}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: 'a' is {fault}"):
        read_weights(tmp_path)


def test_a_compressed_pickle_is_refused(tmp_path):
    """A few kilobytes can hold gigabytes."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "stored")
    with (
        zipfile.ZipFile(tmp_path / "stored") as old,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name) + (bytes(2**20) if name.endswith("data.pkl") else b""))
    with pytest.raises(CheckpointError, match=r"is compressed, and torch\.save compresses nothing"):
        read_weights(tmp_path)
