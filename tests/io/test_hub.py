"""`find_file` in folders and in the Hub's cache, JSON files, and atomic writes."""

from __future__ import annotations

import json
import os
import stat

import pytest
from huggingface_hub import errors

import fastuper.io.hub
from fastuper.io.files import read_json
from fastuper.io.hub import HubOptions, find_file, pin_revision
from fastuper_kernels.dispatch.files import atomic_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture
def cache(tmp_path):
    """The Hub's cache with one repository of two commits, `main` being the second."""
    repository = tmp_path / "cache" / "models--someone--upernet"
    for commit in (OLDER, COMMIT):
        for name in ("config.json", "model.safetensors", "nested/snapshots/config.json"):
            path = repository / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{commit} {name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "v1").write_text(OLDER)
    return tmp_path / "cache"


def offline(cache, **options):
    return HubOptions(cache_dir=cache, local_files_only=True, **options)


def test_file_in_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.json").write_text("{}")
    assert find_file(tmp_path, "sub/config.json") == tmp_path / "sub" / "config.json"
    assert find_file(str(tmp_path), "config.json", HubOptions(subfolder="sub")) == tmp_path / "sub" / "config.json"
    assert find_file(tmp_path, "config.json") is None
    assert find_file(tmp_path, "config.json", HubOptions(subfolder="nowhere")) is None


@pytest.mark.parametrize("kind", ["folder", "link that leads to no file", "pipe or device"])
def test_no_file_of_the_name(tmp_path, kind):
    path = tmp_path / "config.json"
    if kind == "folder":
        path.mkdir()
    elif kind.startswith("link"):
        path.symlink_to(path)
    elif hasattr(os, "mkfifo"):
        os.mkfifo(path)
    else:
        pytest.skip("Windows has no named pipes")
    with pytest.raises(OSError, match=rf"config\.json is a {kind}, where a file is expected"):
        find_file(tmp_path, "config.json")


def test_source_is_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(NotADirectoryError, match="give the folder"):
        find_file(tmp_path / "model.safetensors", "config.json")


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./missing folder", "a/b/c"])
def test_neither_folder_nor_repository(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder here nor the id"):
        find_file(source, "config.json", offline(tmp_path))


def test_file_in_the_cache(cache):
    found = find_file("someone/upernet", "config.json", offline(cache))
    assert found.read_text() == f"{COMMIT} config.json"
    found = find_file("someone/upernet", "config.json", offline(cache, revision="v1"))
    assert found.read_text() == f"{OLDER} config.json"
    found = find_file("someone/upernet", "config.json", offline(cache, subfolder="nested/snapshots"))
    assert found.read_text() == f"{COMMIT} nested/snapshots/config.json"


def test_file_missing_in_a_cached_repository(cache):
    assert find_file("someone/upernet", "pytorch_model.bin", offline(cache)) is None
    assert find_file("someone/upernet", "x.bin", offline(cache, subfolder="nested/snapshots")) is None


def test_an_unreachable_hub_is_no_missing_file(cache, monkeypatch):
    def unreachable(*_, **__):
        raise errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(fastuper.io.hub, "hf_hub_download", unreachable)
    online = HubOptions(cache_dir=cache)
    with pytest.raises(OSError, match=r"its x\.json not in the local cache, and the Hub cannot be reached"):
        find_file("someone/upernet", "x.json", online)
    # The cache records that the Hub has no such file.
    folder = cache / "models--someone--upernet" / ".no_exist" / COMMIT
    folder.mkdir(parents=True)
    (folder / "x.json").touch()
    assert find_file("someone/upernet", "x.json", online) is None


def test_repository_not_cached(cache):
    with pytest.raises(OSError, match=r"someone/else is not a folder here, its config\.json not in the local cache"):
        find_file("someone/else", "config.json", offline(cache))
    with pytest.raises(OSError, match="not in the local cache"):
        find_file("someone/upernet", "config.json", offline(cache, revision="v2"))


def test_a_folder_goes_before_a_repository(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("someone/upernet")
    assert find_file("someone/upernet", "config.json", offline(cache)) is None


@pytest.mark.parametrize(
    ("kind", "raised", "message"),
    [
        (errors.GatedRepoError, PermissionError, "accepted its terms"),
        (errors.RepositoryNotFoundError, FileNotFoundError, "a private one needs `token=`"),
        (errors.RevisionNotFoundError, FileNotFoundError, "no revision 'v9'"),
        (errors.HFValidationError, FileNotFoundError, "nor the id of a Hub repository"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_the_hub_answers(kind, raised, message, monkeypatch):
    def refuse(*args, **kwargs):
        raise kind.__new__(kind)  # their arguments differ between versions of huggingface_hub

    monkeypatch.setattr(fastuper.io.hub, "hf_hub_download", refuse)
    with pytest.raises(raised, match=message) as caught:
        find_file("someone/upernet", "config.json", HubOptions(revision="v9"))
    assert "\n" not in str(caught.value)


def test_no_such_file_on_the_hub(monkeypatch):
    kind = getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError)

    def refuse(*args, **kwargs):
        raise kind.__new__(kind)

    monkeypatch.setattr(fastuper.io.hub, "hf_hub_download", refuse)
    assert find_file("someone/upernet", "model.safetensors") is None


def test_options_reach_the_hub(monkeypatch, tmp_path):
    asked = {}

    def download(repo_id, filename, **kwargs):
        asked.update(kwargs, repo_id=repo_id, filename=filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(fastuper.io.hub, "hf_hub_download", download)
    options = HubOptions("hf_secret", tmp_path, "sub", "v1", local_files_only=False, force_download=True)
    assert find_file("someone/upernet", "config.json", options) == tmp_path / "config.json"
    assert asked == {
        "repo_id": "someone/upernet",
        "filename": "config.json",
        "token": "hf_secret",
        "cache_dir": tmp_path,
        "subfolder": "sub",
        "revision": "v1",
        "local_files_only": False,
        "force_download": True,
    }
    with pytest.raises(ValueError, match="force_download=True and local_files_only=True contradict each other"):
        HubOptions(local_files_only=True, force_download=True)


@pytest.mark.parametrize("subfolder", ["", "nested/snapshots"])
def test_pin_revision(cache, subfolder):
    assert pin_revision("someone/upernet", offline(cache, subfolder=subfolder)).revision == COMMIT
    assert pin_revision("someone/upernet", offline(cache, subfolder=subfolder, revision="v1")).revision == OLDER


def test_pin_revision_leaves_folders_and_others_alone(cache, tmp_path):
    assert pin_revision(tmp_path, offline(cache)) == offline(cache)
    options = offline(cache, subfolder="nested")  # no config.json in it
    with pytest.raises(OSError, match="not in the local cache"):
        pin_revision("someone/upernet", options)


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"é": [1]}), encoding="utf-8")
    assert read_json(path) == {"é": [1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "holds list"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON: it is nested too deeply"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "not valid JSON: .*digits"),
    ],
    ids=["empty", "truncated", "not UTF-8", "a list", "nested", "a long integer"],
)
def test_read_json_refuses(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(OSError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_atomic_path_replaces(tmp_path):
    target = tmp_path / "model.safetensors"
    target.write_text("old")
    with atomic_path(target) as path:
        path.write_text("new")
        assert path.parent == tmp_path
        assert path.suffix == ".safetensors"
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_atomic_path_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "model.safetensors"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as path:  # noqa: PT012
        path.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_atomic_path_replaces_a_link_and_not_its_target(tmp_path):
    (tmp_path / "blob").write_text("shared")
    (tmp_path / "config.json").symlink_to("blob")
    with atomic_path(tmp_path / "config.json") as path:
        path.write_text("own")
    assert (tmp_path / "blob").read_text() == "shared"
    assert (tmp_path / "config.json").read_text() == "own"


def test_atomic_path_gives_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_text("x")
    with atomic_path(tmp_path / "file.json") as path:
        path.write_text("x")
    assert stat.S_IMODE((tmp_path / "file.json").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)
