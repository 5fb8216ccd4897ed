"""Damages the files of a checkpoint's folder, each time in another way that follows from a seed."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VALUES: list[Any] = [
    *(0, -1, 1, 2, 7, 1.5, 400, 401, 16_384, 20_000, 10**6, 10**9, 2**63, 2**2000, 1e308, 1e-300, True, False, None),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "1", "../secret", "\x1b[31m", "9" * 3000, "upernet", "swin"),
    *([], {}, [0], [[1]], [True] * 4, [-1] * 4, [1.0] * 4, ["a"] * 4, [10**6] * 4, [1, 1, 1, 10**6], [1] * 100_000),
    *({"a": 1}, {"model_type": "swin"}, {"model_type": []}, {str(i): "a" for i in range(70_000)}, [float("nan")] * 3),
]
TEXTS = [
    b"",
    b"[" * 100_000,
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b'{"zz": ' + b"9" * 5000 + b"}",
    b'{"zz": ' + b"9" * 4000 + b"}",
    b"{}",
    b"[]",
    b"null",
    b"\x00" * 1000,
    b'{"model_type": "upernet"}',
    b'{"model_type": "upernet", "model_type": "swin"}',
    b'{"encoder_name": "resnet34", "classes": 3}',
    b'{"architecture": "resnet50", "pretrained_cfg": {}}',
    b'{"model_type": "upernet", "backbone": "../secret"}',
]


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of a folder; return what was done."""
    path = rng.choice(sorted(folder.iterdir()))
    if rng.random() < 0.1:
        return _replace(path, rng)
    if path.suffix == ".json":
        return rng.choice([_json_value, _json_value, _json_value, _json_value, _text, _bytes])(path, rng)
    return rng.choice([_safetensors if path.suffix == ".safetensors" else _pickle, _bytes])(path, rng)


def _replace(path: Path, rng: random.Random) -> str:
    """Put something that is no file in a file's place."""
    path.unlink()
    kinds: dict[str, Callable[[], Any]] = {
        "missing": lambda: None,
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a loop of links": lambda: path.symlink_to(path),
        "a link to nothing": lambda: path.symlink_to("nothing"),
        "a link to a device": lambda: path.symlink_to("/dev/zero"),
    }
    kind = rng.choice(list(kinds))
    kinds[kind]()
    return f"{path.name} is {kind}"


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return each place in a JSON value, as a container and a key."""
    for key in range(len(value)) if isinstance(value, list) else list(value):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            _places(value[key], found)
    return found


def _json_value(path: Path, rng: random.Random) -> str:
    content = json.loads(path.read_text())
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        places = _places(content, [])
        if not places:
            break
        container, key = rng.choice(places)
        action = rng.choice(["replace", "replace", "replace", "remove", "rename", "grow"])
        if action == "replace":
            container[key] = rng.choice(["../secret/shard.safetensors", "/etc/passwd", *VALUES])
        elif action == "remove":
            del container[key]
        elif action == "rename" and isinstance(container, dict):
            container[rng.choice(["to_dict", "__class__", "self", "_out_features", "config", "x" * 5000])] = container[
                key
            ]
        elif isinstance(container[key], list):
            container[key] *= rng.choice([2, 30_000])
        elif isinstance(container[key], int | float):
            container[key] = container[key] * rng.choice([2, -1, 1000, 0.5, 10**9])
        done.append(f"{action} {str(key)[:30]}")
    path.write_text(json.dumps(content))
    return f"{path.name}: {', '.join(done)}"


def _text(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    others = [content.decode().encode("utf-16"), b"\xef\xbb\xbf" + content, content[:-1] + b', "depths": [1]}']
    path.write_bytes(text := rng.choice([*TEXTS, *others]))
    return f"{path.name}: {text[:40]!r}"


def _bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
        done = f"cut to {len(content)} bytes"
    else:
        places = [rng.randrange(min(len(content), 3000) if rng.random() < 0.8 else len(content)) for _ in range(3)]
        for place in places:
            content[place] = rng.randrange(256)
        done = f"other bytes at {places}"
    path.write_bytes(content)
    return f"{path.name}: {done}"


def _safetensors(path: Path, rng: random.Random) -> str:
    """Change the header: its length, or a tensor's name, shape, dtype or place."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    if rng.random() < 0.2:
        wrong = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**60, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", wrong) + content[8:])
        return f"{path.name}: header of {wrong} bytes"
    header = json.loads(content[8 : 8 + length])
    name = rng.choice([name for name in header if name != "__metadata__"])
    changes = {
        "shape": rng.choice([[], [0], [2**40], [2**62, 2**62], [-1], [1], header[name]["shape"][::-1]]),
        "dtype": rng.choice(["I8", "F8_E4M3", "BF16", "X", "BOOL", 5]),
        "data_offsets": rng.choice([[0, 0], [0, 2**60], [4, 0], [-1, 3], [1]]),
    }
    key = rng.choice([*changes, "name", "swap"])
    if key == "name":
        header[rng.choice(["module." + name, "x" * 10_000, "", "\x1b[31m"])] = header.pop(name)
    elif key == "swap":
        header = {n if n == "__metadata__" else rng.choice(["module.", "model."]) + n: v for n, v in header.items()}
    else:
        header[name][key] = changes[key]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return f"{path.name}: {key} of {name}"


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def _pickle(path: Path, rng: random.Random) -> str:
    tensors = torch.load(path, weights_only=True)
    name = rng.choice(sorted(tensors))
    huge = torch.zeros(1).expand(2**40)
    values = {
        "code": lambda: {**tensors, name: _Code()},
        "a wrapper": lambda: {"state_dict": tensors, "epoch": 3},
        "nothing": dict,
        "one tensor": lambda: {name: tensors[name]},
        "huge": lambda: {**tensors, name: huge},
        "sparse": lambda: {**tensors, name: torch.eye(4).to_sparse()},
        "meta": lambda: {**tensors, name: tensors[name].to("meta")},
        "integers": lambda: {**tensors, name: tensors[name].to(torch.int8)},
        "numbers for names": lambda: dict(enumerate(tensors.values())),
        "other names": lambda: {f"module.{n}": t for n, t in tensors.items()},
        "a list": lambda: list(tensors),
    }
    kind = rng.choice([*values, "compressed", "plain pickle"])
    if kind == "compressed":
        with zipfile.ZipFile(path) as old:
            entries = {entry.filename: old.read(entry) for entry in old.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for filename, content in entries.items():
                new.writestr(filename, content + (bytes(2**22) if filename.endswith("data.pkl") else b""))
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(rng.choice([_Code(), [1], {"a": [0] * 1000}])))
    else:
        torch.save(values[kind](), path)
    return f"{path.name}: {kind}, {name}"
