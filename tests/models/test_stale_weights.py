"""Weights that change after a forward pass: the next pass uses their new values.

No single one of a tensor's identity, address and version reveals all of these changes.
"""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

import fastuper.models.heads.strips
import fastuper_kernels.cpu.packs as packs
from fastuper.models.heads.upernet import UperNetHead
from fastuper_kernels.cpu import winograd
from tests.models.heads import as_written, error, feature_maps, head, randomize

WIDE = 64
SIZES = [(18, 20), (9, 10), (5, 5), (3, 3)]


@pytest.fixture(autouse=True)
def all_packs(monkeypatch):
    """Winograd's packs are made for small maps too."""
    operation = importlib.import_module("fastuper_kernels.cpu.conv")
    monkeypatch.setattr(operation, "_way", lambda x, _: "winograd" if x.dtype == torch.float32 else "direct")
    calls, convolve = [], winograd.conv3x3
    monkeypatch.setattr(winograd, "conv3x3", lambda *arguments: calls.append(1) or convolve(*arguments))
    return calls


def fresh(model, dtype=torch.float32):
    """Return a new head with copies of the same values, so that it has no packs yet."""
    new = head(WIDE, seed=99).to(dtype)
    new.load_state_dict(copy.deepcopy(model.state_dict()))
    for module, other in zip(model.modules(), new.modules(), strict=True):
        if isinstance(module, nn.BatchNorm2d):
            other.eps = module.eps
    return new


def give_gradients(model):
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def optimizer_step(kind, **options):
    def change(model):
        give_gradients(model)
        kind(model.parameters(), lr=0.05, **options).step()

    return change


def every(model, kind=nn.Conv2d):
    return [module for module in model.modules() if isinstance(module, kind)]


def write_data(model):
    for conv in every(model):
        conv.weight.data.mul_(torch.linspace(0.5, 2, conv.weight.shape[0]).view(-1, 1, 1, 1))


def replace_data(model):
    for conv in every(model):
        conv.weight.data = conv.weight.data.flip(0)


def write_one_value(model):
    for conv in every(model):
        conv.weight.data[0, -1, 0, 0] += 2


def negate(model):
    for conv in every(model):
        conv.weight.data.neg_()


def double(model):
    for conv in every(model):
        conv.weight.data.mul_(2)


def exchange_two_channels(model):
    for conv in every(model):
        conv.weight.data[:, [0, 1]] = conv.weight.data[:, [1, 0]]


def mirror_the_taps(model):
    for conv in every(model):
        conv.weight.data.copy_(conv.weight.data.flip(-1).roll(1, 1))


def write_through_numpy(model):
    for conv in every(model):
        conv.weight.detach().numpy()[:] *= 1.5


@torch.no_grad()
def write_in_place(model):
    for conv in every(model):
        conv.weight.add_(0.01)


def write_in_inference_mode(model):
    with torch.inference_mode():
        for conv in every(model):
            conv.weight.mul_(-0.7)


def replace_parameters(model):
    for conv in every(model):
        conv.weight = nn.Parameter(conv.weight.detach().roll(1, 0))


def load(model):
    model.load_state_dict(head(WIDE, seed=1).state_dict())


def load_and_assign(model):
    model.load_state_dict(head(WIDE, seed=1).state_dict(), assign=True)


def load_from_a_vector(model):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector.detach().roll(7), model.parameters())


def round_to_bfloat16(model):
    model.to(torch.bfloat16).to(torch.float32)


def train_without_steps(model):
    model.train()
    for seed in range(4):
        with torch.no_grad():
            model([3 * x + 1 for x in feature_maps(sizes=SIZES, seed=seed)])
    model.eval()


def write_statistics(model):
    for norm in every(model, nn.BatchNorm2d):
        norm.running_mean.data.add_(0.3)
        norm.running_var.data.mul_(1.7)


def write_scales(model):
    for norm in every(model, nn.BatchNorm2d):
        norm.weight.data.mul_(0.8)
        norm.bias.data.add_(0.2)


def change_eps(model):
    for norm in every(model, nn.BatchNorm2d):
        norm.eps = 0.2


CHANGES = {
    "adamw-fused": optimizer_step(torch.optim.AdamW, fused=True),
    "adamw": optimizer_step(torch.optim.AdamW),
    "sgd-foreach": optimizer_step(torch.optim.SGD, foreach=True),
    "data-written": write_data,
    "data-replaced": replace_data,
    "one-value": write_one_value,
    "negated": negate,
    "doubled": double,
    "channels-exchanged": exchange_two_channels,
    "taps-mirrored": mirror_the_taps,
    "numpy": write_through_numpy,
    "in-place": write_in_place,
    "in-inference-mode": write_in_inference_mode,
    "parameters-replaced": replace_parameters,
    "load_state_dict": load,
    "load_state_dict-assign": load_and_assign,
    "vector_to_parameters": load_from_a_vector,
    "to-and-back": round_to_bfloat16,
    "trained-statistics": train_without_steps,
    "statistics-written": write_statistics,
    "scales-written": write_scales,
    "eps": change_eps,
}


@pytest.mark.parametrize("inference_mode", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_used(change, inference_mode):
    model, maps = head(WIDE), feature_maps(sizes=SIZES)
    packs.clear()
    context = torch.inference_mode if inference_mode else torch.no_grad
    with context():
        model(maps)
        before = model(maps)
    assert packs.packed_bytes() > 0
    CHANGES[change](model)
    with context():
        after, expected = model(maps), fresh(model)(maps)
    assert error(after, expected) < 1e-6
    assert error(before, expected) > 1e-3
    with torch.no_grad():
        assert error(after, as_written(copy.deepcopy(model).double(), [x.double() for x in maps])) < 5e-6


def test_a_change_of_any_tensor_is_used(all_packs):
    model, maps = head(WIDE), feature_maps(1, sizes=SIZES)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}
    with torch.no_grad():
        before = model(maps)
        for name, tensor in tensors.items():
            tensor.view(len(tensor), -1)[:, 0] += 0.5  # one value an output channel, because ReLU hides some channels
            after = model(maps)
            assert not torch.equal(before, after), name
            assert error(after, fresh(model)(maps)) < 1e-6, name
            before = after
    assert all_packs, "Winograd's transform was not used"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
def test_other_dtypes(dtype):
    model, maps = head(WIDE).to(dtype), feature_maps(sizes=SIZES, dtype=dtype)
    with torch.no_grad():
        before = model(maps)
        write_data(model)
        after, expected = model(maps), fresh(model, dtype)(maps)
    assert error(after, expected) < 1e-6
    assert error(before, expected) > 1e-2


def test_a_weight_made_in_inference_mode():
    """A tensor made in inference mode has no version counter."""
    with torch.inference_mode():
        model = head(WIDE)
        maps = feature_maps(sizes=SIZES)
        before = model(maps)
        write_in_place(model)
        after = model(maps)
    expected = fresh(model)
    with torch.no_grad():
        assert error(after, expected(maps)) < 1e-6
    assert error(before, after) > 1e-3


def test_moving_to_another_dtype_and_back():
    model, maps = head(WIDE), feature_maps(sizes=SIZES)
    with torch.no_grad():
        before = model(maps)
        wide = model.double()([x.double() for x in maps])
        after = model.float()(maps)
    assert wide.dtype == torch.float64
    assert torch.equal(before, after)
    assert error(before, wide) < 2e-6


def test_training_and_evaluation_in_turns():
    model, maps = head(WIDE), feature_maps(sizes=SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        model(maps).square().mean().backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            assert error(model(maps), fresh(model)(maps)) < 1e-6


def test_tied_weights():
    model, maps = head(WIDE), feature_maps(sizes=SIZES)
    model.fpn_convs[1].conv.weight = model.fpn_convs[0].conv.weight
    with torch.no_grad():
        model(maps)
        model.fpn_convs[0].conv.weight.data.mul_(1.5)
        assert error(model(maps), as_written(model, maps)) < 2e-6


def test_frozen_norms_train_with_their_statistics():
    """Usual fine-tuning: gradients on, norms in evaluation. No norm is folded, no weight is packed."""
    model, maps = randomize(head(WIDE).train(), 3), feature_maps(sizes=SIZES)
    for norm in every(model, nn.BatchNorm2d):
        norm.eval()
    assert isinstance(model, UperNetHead)
    other = copy.deepcopy(model)
    model(maps).square().mean().backward()
    as_written(other, maps).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) < 1e-4, name
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_strips_fingerprint_a_weight_once_a_call(monkeypatch):
    """A fingerprint reads all bytes of a weight, too many to read for every strip. The next call makes a new one."""
    model, maps = head(64), feature_maps(2, [(40, 48), (20, 24), (10, 12), (5, 6)])
    monkeypatch.setattr(fastuper.models.heads.strips, "STRIP_BYTES", 1)
    looked = []
    fingerprint = packs.fingerprint
    monkeypatch.setattr(packs, "fingerprint", lambda weight: looked.append(weight.data_ptr()) or fingerprint(weight))
    with torch.no_grad():
        model(maps)
        looked.clear()
        before = model(maps)
        assert len(looked) == len(set(looked)) > 3
        model.fpn_convs[0].conv.weight.data.mul_(2)
        assert not torch.equal(model(maps), before)
