"""Checks that an accelerated model is the same function as before, for models of any library."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from bench.numerics import error, root_mean_square
from fastuper.models.heads import strips
from fastuper.patch.acceleration import accelerate, explain, restore
from tests.models.heads import randomize

EXACT = 1e-12  # of float64
TRAINED = 1e-9  # of gradients and weights in float64, which BatchNorm over few cells amplifies


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        make: returns a small model.
        run: returns the logits of a model for images (B, 3, *size).
        head: the name of the module that is accelerated.
        loss: returns the loss of a model for images and labels (B, *size).
        size: of the images.
        strips: False if a module of the head excludes strips.
    """

    make: Callable[[], nn.Module]
    run: Callable[[Any, torch.Tensor], torch.Tensor]
    head: str
    loss: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    size: tuple[int, int] = (48, 48)
    strips: bool = True

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        """Return a model in evaluation, with random weights and statistics."""
        torch.manual_seed(seed)
        return randomize(self.make(), seed).to(dtype).eval()

    def images(self, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(batch, 3, *self.size, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def labels(self, batch: int = 2, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, (batch, *self.size), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def equal(kind: Kind, ours: nn.Module, theirs: nn.Module, images: torch.Tensor | None = None) -> None:
    """Both models have the same logits in float64."""
    images = kind.images(dtype=torch.float64) if images is None else images
    assert error(kind.run(ours, images), kind.run(theirs, images)) < EXACT


def pair(kind: Kind) -> tuple[Any, Any]:
    """Return an accelerated model and its original, in float64."""
    theirs = kind.model(dtype=torch.float64)
    return accelerate(copy.deepcopy(theirs)), theirs


def check_evaluation(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of docs/accuracy.md, with and without strips; equality in float64; no other layout of the result."""
    ran = []
    monkeypatch.setattr(strips, "run", lambda *args, run=strips.run: ran.append(1) or run(*args))
    for size_of_strip in (strips.STRIP_BYTES, 1):
        monkeypatch.setattr(strips, "STRIP_BYTES", size_of_strip)
        errors: dict[str, list[float]] = {"ours": [], "contiguous": [], "channels_last": []}
        for seed in range(3):
            theirs = kind.model(seed)
            ours, exact = accelerate(copy.deepcopy(theirs)), copy.deepcopy(theirs).double()
            images = kind.images(seed=seed)
            last = images.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():  # first, because Transformers' BEiT keeps tensors of its first forward
                truth = kind.run(exact, images.double())
            with torch.inference_mode():
                given = kind.run(ours, images)
                assert given.is_contiguous()
                errors["ours"] += [error(given, truth), error(kind.run(ours, last), truth)]
                errors["contiguous"].append(error(kind.run(theirs, images), truth))
                errors["channels_last"].append(error(kind.run(theirs, last), truth))
                assert error(kind.run(accelerate(exact), images.double()), truth) < EXACT
        ours, *theirs = (root_mean_square(values) for values in errors.values())
        assert ours <= max(1.25 * max(theirs), 4 * torch.finfo(torch.float32).eps)
    assert bool(ran) == kind.strips


def check_autocast(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(4):
        theirs, images = kind.model(seed), kind.images(seed=seed)
        with torch.no_grad():
            truth = kind.run(copy.deepcopy(theirs).double(), images.double())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            before = kind.run(theirs, images)
            after = kind.run(accelerate(theirs), images)
        assert after.dtype == before.dtype
        errors["ours"].append(error(after, truth))
        errors["theirs"].append(error(before, truth))
    assert root_mean_square(errors["ours"]) <= 1.25 * root_mean_square(errors["theirs"])


def check_training(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps: the losses, all gradients, the weights and the statistics after them. Dropout draws the same."""
    ours, theirs = pair(kind)
    losses: list[list[torch.Tensor]] = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses.append([])
        for step in range(2):
            optimizer.zero_grad()
            loss = kind.loss(model, kind.images(4, step, torch.float64), kind.labels(4, step))
            loss.backward()
            losses[-1].append(loss.detach())
            optimizer.step()
    for loss, expected in zip(*losses, strict=True):
        assert error(loss, expected) < TRAINED
    parameters = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == parameters.keys()
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (parameters[name].grad is None), name
        if parameter.grad is not None:
            largest = max(float(p.grad.norm()) for p in parameters.values() if p.grad is not None)
            assert float((parameter.grad - parameters[name].grad).norm()) < TRAINED * largest, name
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=TRAINED, atol=TRAINED)
    equal(kind, ours.eval(), theirs.eval())


def seen_by_hook(kind: Kind, model: nn.Module, name: str) -> list[Any]:
    """Return the arguments and the result of each call of a module inside a model."""
    seen: list[Any] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # A module may change its input or, in the next module, its output in place.
        seen.append(copy.deepcopy(output))

    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        kind.run(model, kind.images(1, dtype=torch.float64))
    handle.remove()
    return seen


def check_hooks(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on any module inside the head is called as often as before, and sees the same results."""
    ours, theirs = pair(kind)
    monkeypatch.setattr(strips, "STRIP_BYTES", 1)
    names = [f"{kind.head}.{name}".rstrip(".") for name, _ in theirs.get_submodule(kind.head).named_modules()]
    called = 0
    for name in names:
        expected, given = seen_by_hook(kind, theirs, name), seen_by_hook(kind, ours, name)
        assert len(given) == len(expected), name
        called += len(expected)
        for one, other in zip(given, expected, strict=True):
            for x, y in zip(flat(one), flat(other), strict=True):
                assert error(x, y) < EXACT, name
    assert called > 20


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [x for item in values if item is not None for x in flat(item)]


class Twice(nn.Conv2d):
    """A convolution that adds something to its result, as LoRA does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def check_replaced_modules(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each convolution in turn, the classifier too, then norms and activations: in place of it, another class."""
    monkeypatch.setattr(strips, "STRIP_BYTES", 1)
    ours, theirs = pair(kind)
    images = kind.images(1, dtype=torch.float64)
    with torch.no_grad():
        first = kind.run(theirs, images)
    modules = dict(theirs.get_submodule(kind.head).named_modules())
    for name, module in modules.items():
        if type(module) is not nn.Conv2d:
            continue
        for model in (ours, theirs):
            model.get_submodule(kind.head).get_submodule(name).__class__ = Twice
        equal(kind, ours, theirs, images)
        for model in (ours, theirs):
            model.get_submodule(kind.head).get_submodule(name).__class__ = nn.Conv2d
    assert any(type(module) is nn.Conv2d for module in modules.values())
    for model in (ours, theirs):
        for module in list(model.get_submodule(kind.head).modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.ReLU and not isinstance(getattr(module, "layers", None), list):
                    setattr(module, name, nn.LeakyReLU()) if not name.isdigit() else module.__setitem__(
                        int(name), nn.LeakyReLU()
                    )
    equal(kind, ours, theirs, images)
    with torch.no_grad():
        assert error(kind.run(ours, images), first) > 1e-3


def check_new_weights(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and statistics changed after a forward are read: in place, through `.data`, by `load_state_dict`."""
    monkeypatch.setattr(strips, "STRIP_BYTES", 1)
    ours, theirs = pair(kind)
    equal(kind, ours, theirs)
    for model in (ours, theirs):
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
    equal(kind, ours, theirs)
    state = kind.model(seed=1, dtype=torch.float64).state_dict()
    for model in (ours, theirs):
        model.load_state_dict(copy.deepcopy(state))
    equal(kind, ours, theirs)
    for model in (ours, theirs):
        model.load_state_dict(kind.model(seed=2, dtype=torch.float64).state_dict(), assign=True)
    equal(kind, ours, theirs)


def check_copies(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model stays one object with its names, pickles, is copied, is restored, and is accelerated again."""
    theirs = kind.model(dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    classes = {name: type(module) for name, module in ours.named_modules()}
    parameters = dict(ours.named_parameters())
    assert accelerate(ours) is ours
    assert any(type(module) is not classes[name] for name, module in ours.named_modules())
    assert all(isinstance(module, classes[name]) for name, module in ours.named_modules())
    assert all(type(module).__name__ == classes[name].__name__ for name, module in ours.named_modules())
    assert all(parameter is parameters[name] for name, parameter in ours.named_parameters())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(module) for module in other.modules()] == [type(module) for module in ours.modules()]
        equal(kind, other, theirs)
    for name, module in ours.named_modules():
        before = inspect.signature(classes[name].forward)
        assert list(inspect.signature(type(module).forward).parameters) == list(before.parameters), name
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(ours)
    assert restore(ours) is ours
    assert {name: type(module) for name, module in ours.named_modules()} == classes
    equal(kind, accelerate(ours), theirs)


def check_wrappers(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model inside `nn.Sequential`, and as a child of another module."""
    ours, theirs = kind.model(dtype=torch.float64), kind.model(dtype=torch.float64)
    holder = nn.Module()
    holder.network = nn.Sequential(ours)
    assert accelerate(holder) is holder
    assert ours.get_submodule(kind.head).__class__ is not theirs.get_submodule(kind.head).__class__
    equal(kind, ours, theirs)


def check_replaced_head(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without its head is refused in one line, and stays as it is."""
    model = kind.model()
    setattr(model, kind.head, nn.Identity())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"its {kind.head} is a Identity, and holds no .*U[Pp]er") as caught:
        accelerate(model)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == classes


def check_explain(kind: Kind, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = accelerate(kind.model())
    explain(model)
    text = capsys.readouterr().out
    assert kind.head in text
    assert "called as it is" not in text
    *_, last = (module for module in model.get_submodule(kind.head).modules() if type(module) is nn.Conv2d)
    last.register_forward_hook(lambda *_: None)
    explain(model)
    assert "a hook is registered on it" in " ".join(capsys.readouterr().out.split())


CHECKS: dict[str, Callable[[Kind, pytest.MonkeyPatch], None]] = {
    "evaluation": check_evaluation,
    "autocast": check_autocast,
    "training": check_training,
    "hooks": check_hooks,
    "replaced modules": check_replaced_modules,
    "new weights": check_new_weights,
    "copies": check_copies,
    "wrappers": check_wrappers,
    "a replaced head": check_replaced_head,
}
