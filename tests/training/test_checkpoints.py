"""Damaged checkpoints give way to the one before, and states are matched by the names of parameters."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastuper.training.trainer
from fastuper.training.checkpoints import (
    CHECKSUMS,
    STATE,
    find_damage,
    load_optimizer,
    named_failures,
    optimizer_by_names,
    read_state,
    write_checksums,
)
from fastuper.training.config import TrainingError
from fastuper.training.runs import RunFolder
from tests.training.common import losses, read_log, tiny_model, train


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "config.json").write_text("{}")
    torch.save({"step": 1}, folder / STATE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write(folder)
    write_checksums(folder)
    return folder


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["model.safetensors", "config.json", STATE]), st.floats(0, 1, exclude_max=True), st.integers(0, 7)
)
def test_every_flipped_bit_is_found(checkpoint, name, place, bit):
    content = bytearray((checkpoint / name).read_bytes())
    changed = content.copy()
    changed[int(place * len(content))] ^= 1 << bit
    try:
        (checkpoint / name).write_bytes(changed)
        assert find_damage(checkpoint) == f"{name} differs from its checksum"
    finally:
        (checkpoint / name).write_bytes(content)
    assert find_damage(checkpoint) is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.sampled_from([b"{}", b"[]", b'{"training_state.pt": 3}', b'{"\\u0000": ""}']))
def test_damaged_checksums_are_damage(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("x")
    write(folder)
    (folder / CHECKSUMS).write_bytes(content)
    found = find_damage(folder)
    assert found
    assert "\n" not in found


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link in a circle": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.mark.parametrize("name", ["model.safetensors", STATE, CHECKSUMS])
@pytest.mark.parametrize("how", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(how, name, tmp_path):
    run = RunFolder(tmp_path)
    run.prepare()
    for step in (10, 20):
        run.save(step, 20 if step == 20 else None, write)
    assert run.newest_intact() == (20, [])
    how(run.folder(20) / name)
    step, (line,) = run.newest_intact()
    assert step == 10
    assert line.startswith(f"the checkpoint {run.folder(20)} is damaged (")
    assert name in line
    run.link_and_prune(10, None, keep_newer=True)
    assert run.folder(20).exists(), "it stays until another checkpoint is written"
    how(run.folder(10) / name)
    with pytest.raises(TrainingError, match=r"step-000000020 is damaged .*step-000000010 is damaged .*or --restart"):
        run.newest_intact()


def test_a_folder_without_checkpoints_has_no_damage(tmp_path):
    run = RunFolder(tmp_path)
    assert run.newest_intact() == (None, [])
    run.prepare()
    (run.checkpoints / "mine").mkdir()
    assert run.newest_intact() == (None, [])


def test_run_with_a_damaged_checkpoint_ends_as_an_undamaged_one(tmp_path, capsys):
    train(tmp_path / "whole", steps=4, save_every=1)
    train(tmp_path / "run", steps=4, save_every=1)
    last = tmp_path / "run" / "checkpoints" / "step-000000004"
    weights = last / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    train(tmp_path / "run", steps=4, save_every=1)
    said = capsys.readouterr().out
    assert f"the checkpoint {last} is damaged (model.safetensors differs from its checksum): resuming from" in said
    assert "resuming from step 3 of 4" in said
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")
    assert weights.read_bytes() == (tmp_path / "whole" / "last" / "model.safetensors").read_bytes()


# States by names


def test_the_order_of_the_parameters_does_not_count(tmp_path, monkeypatch):
    train(tmp_path / "whole", steps=4, save_every=2, learning_rate=1e-2)
    train(tmp_path / "run", steps=4, save_every=2, learning_rate=1e-2)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000000004")
    groups = fastuper.training.trainer.parameter_groups

    def turned(model, recipe):
        found = groups(model, recipe)[::-1]
        for group in found:
            group["params"].reverse()
        return found

    monkeypatch.setattr(fastuper.training.trainer, "parameter_groups", turned)
    train(tmp_path / "run", steps=4, save_every=2, learning_rate=1e-2)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    state, expected = (read_state(tmp_path / name / "last")["optimizer"]["state"] for name in ("run", "whole"))
    assert state.keys() == expected.keys() == {name for name, _ in tiny_model().named_parameters()}
    assert list(state) != list(expected)
    torch.testing.assert_close([state[name] for name in expected], list(expected.values()), rtol=0, atol=0)


def adamw(parameters: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW([{"params": list(parameters.items())}])


def parameters(**shapes: int) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.ones(size)) for name, size in shapes.items()}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": 2, "c": 3}, "compared with this model it has no c and has b; give the model of the run, or"),
        ({"a": 2}, "it has b; give"),
        ({"a": 2, "b": 3, "c": 1, "d": 1}, "it has no c, d; give"),
        ({"a": 2, "b": 4}, r"the state of b has the shape \(3,\), the parameter \(4,\)"),
    ],
)
def test_states_of_other_parameters_are_refused(shapes, message):
    old = parameters(a=2, b=3)
    optimizer = adamw(old)
    sum(parameter.sum() for parameter in old.values()).backward()
    optimizer.step()
    with pytest.raises(TrainingError, match=message) as raised:
        load_optimizer(adamw(parameters(**shapes)), optimizer_by_names(optimizer), Path("state.pt"))
    assert str(raised.value).startswith("state.pt")
    assert "\n" not in str(raised.value)


def test_states_of_other_groups_are_refused():
    optimizer = torch.optim.AdamW(
        [{"params": list(parameters(a=1).items())}, {"params": list(parameters(b=1).items())}]
    )
    with pytest.raises(TrainingError, match=r"divides the parameters into other groups: a, b were not together"):
        load_optimizer(adamw(parameters(a=1, b=1)), optimizer_by_names(optimizer), Path("state.pt"))


def test_states_of_another_form_are_refused_in_one_line(tmp_path):
    train(tmp_path, steps=2, save_every=2)
    folder = tmp_path / "checkpoints" / "step-000000002"
    state, whole = read_state(folder), read_state(folder)
    changes = [{name: None} for name in state if name not in ("settings", "best")]
    changes += [{"best": value} for value in ({"curve": 1}, [1], "x", 3)]
    changes += [{"optimizer": value} for value in ({}, [], {"state": {}, "groups": [{}]}, {"state": 1, "groups": []})]
    variants = [{**state, **change} for change in changes]
    variants += [{name: value for name, value in state.items() if name != left} for left in state]
    for variant in [*variants, [], "curve", None, {}]:
        torch.save(variant, folder / STATE)
        write_checksums(folder)
        with pytest.raises((TrainingError, OSError)) as raised:
            train(tmp_path, steps=2, save_every=2)
        assert str(folder / STATE) in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / ".fastuper-lock.json").exists()
    del state["optimizer"]["state"]["decode_head.classifier.weight"]
    for group in state["optimizer"]["groups"]:
        group["param_names"] = [name for name in group["param_names"] if name != "decode_head.classifier.weight"]
    torch.save(state, folder / STATE)
    write_checksums(folder)
    with pytest.raises(TrainingError, match=r"training_state\.pt is .*it has no decode_head\.classifier\.weight; give"):
        train(tmp_path, steps=2, save_every=2)
    state = whole
    torch.save(state, folder / STATE)
    write_checksums(folder)
    train(tmp_path, steps=2, save_every=2)


# A full disk


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), "File too large"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 534"), "inline_container"),
    ],
)
def test_failed_writes_name_file_reason_and_space(error, reason, tmp_path):
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary" / STATE).touch()
    with (
        pytest.raises(OSError, match=rf"step-3/training_state.pt: .*{reason}.*; a checkpoint needs 1\.5 GB, and \d"),
        named_failures(tmp_path / "temporary", tmp_path / "step-3", 1_500_000_000),
    ):
        raise error


def test_an_interrupted_write_is_no_full_disk(tmp_path, monkeypatch):
    class Disk(io.FileIO):
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes == 3:
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr("builtins.open", lambda path, mode: Disk(path, "w"))
    with pytest.raises(KeyboardInterrupt), named_failures(tmp_path, tmp_path, 1):
        fastuper.training.trainer.write_state(tmp_path, {"a": torch.zeros(1 << 16)})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_full_device_is_named(tmp_path):
    (tmp_path / STATE).symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match=r"training_state.pt: No space left on device"),
        named_failures(tmp_path, tmp_path, 1),
    ):
        fastuper.training.trainer.write_state(tmp_path, {"a": torch.zeros(1 << 16)})
