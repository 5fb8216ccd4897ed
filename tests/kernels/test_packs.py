"""Packs: used while the weights are the same, and made again once the weights have changed."""

from __future__ import annotations

import gc
import importlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastuper_kernels import conv_bn_relu, upsampled_conv3x3
from fastuper_kernels.cpu import packs, winograd
from fastuper_kernels.cpu.packs import fingerprint, packed
from tests.kernels.common import laid_out, name_of, random

many = settings(max_examples=80, deadline=None, derandomize=True)
ALL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
calls = threading.local()


def copied(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pack by a copy, and count the calls."""
    calls.count = getattr(calls, "count", 0) + 1
    return weight.to(dtype, copy=True).contiguous()


@pytest.fixture(autouse=True)
def empty():
    packs.clear()
    calls.count = 0


def check(weight: torch.Tensor, dtype: torch.dtype | None = None, count: int | None = None) -> None:
    """Check that the pack is of the current weights, and that `count` packs have been made so far."""
    pack = packed(weight, copied, dtype or weight.dtype)
    expected = weight.to(dtype or weight.dtype)
    assert torch.equal(
        pack.view(INTEGERS[pack.element_size()]), expected.contiguous().view(INTEGERS[pack.element_size()])
    )
    if count is not None:
        assert calls.count == count


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided", "transposed", "channels-of-more"])
@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (5, 3, 3, 3), (7, 5, 1, 1), (1, 1, 3, 3), (1, 1, 1, 1)], ids=str)
def test_packed_once_while_the_weights_are_the_same(shape, layout, dtype):
    weight = laid_out(random(*shape, dtype=dtype), layout)
    for _ in range(3):
        check(weight, count=1)
    weight.mul_(2)
    check(weight, count=2)
    check(weight, torch.float32, count=2 if dtype == torch.float32 else 3)


# Changes of a weight that only its contents show ---------------------------------------------------------------------


def by_data(weight: torch.Tensor) -> None:
    weight.data[3, 2] = 7.0


def in_place(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight[3, 2, 1, 1] += 1e-3


def under_inference_mode(weight: torch.Tensor) -> None:
    with torch.inference_mode():
        weight.detach().add_(0.5)


def by_numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[0, 0] = 3.0


def replaced_data(weight: torch.Tensor) -> None:
    weight.data = random(*weight.shape, seed=5).to(weight.dtype)


def copied_over(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(random(*weight.shape, seed=6))


def by_set(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.set_(random(*weight.shape, seed=7).to(weight.dtype))


CHANGES = [by_data, in_place, under_inference_mode, by_numpy, replaced_data, copied_over, by_set]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_a_change_makes_a_new_pack(change, layout):
    weight = torch.nn.Parameter(laid_out(random(8, 6, 3, 3).float(), layout))
    check(weight, count=1)
    before = weight.detach().clone()
    change(weight)
    assert not torch.equal(before, weight)
    check(weight, count=2)
    check(weight, count=2)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD], ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_a_step_of_an_optimizer_makes_a_new_pack(make, options):
    weight = torch.nn.Parameter(random(8, 6, 3, 3).float())
    optimizer = make([weight], lr=1e-4, **options)
    for step in range(3):
        check(weight, count=step + 1)
        weight.square().sum().backward()
        optimizer.step()
    check(weight, count=4)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "transposed"])
@pytest.mark.parametrize("sizes", [(8, 4), (6, 5)], ids=str)
@pytest.mark.parametrize("weights", ["random", "ones", "identity", "symmetric"])
def test_permutations_and_signs_change_the_fingerprint(weights, sizes, layout, dtype):
    """Changes that keep the sums of rows and columns, or the multiset of values."""
    out, into = sizes
    weight = random(out, into, 3, 3).to(dtype)
    if weights == "ones":
        weight = torch.ones(out, into, 3, 3, dtype=dtype)
    elif weights == "identity":
        torch.nn.init.dirac_(weight)
    elif weights == "symmetric":
        half = random(1, into, 3, 3).to(dtype)
        weight = torch.cat([half if i % 4 in (0, 3) else -half for i in range(out)])
    changed = {
        "negated": -weight,
        "rows negated": torch.cat([-weight[:2], weight[2:]]),
        "columns negated": torch.cat([weight[:, :1], -weight[:, 1:3], weight[:, 3:]], dim=1),
        "columns 1 and 3 negated": weight * torch.tensor([1, -1, 1, -1, 1][:into], dtype=dtype)[:, None, None],
        "rows rolled": weight.roll(1, 0),
        "rows swapped": weight[[1, 0, *range(2, out)]],
        "rows in pairs": weight[[1, 0, 3, 2, *range(4, out)]],
        "rows flipped": weight.flip(0),
        "columns rolled": weight.roll(1, 1),
        "columns flipped": weight.flip(1),
        "columns swapped": weight[:, [1, 0, *range(2, into)]],
        "taps flipped": weight.flip(2, 3),
        "taps transposed": weight.transpose(2, 3),
        "taps rolled": weight.roll(1, 3),
    }
    buffer = laid_out(weight, layout).clone()  # all values at the same place in memory
    kept = fingerprint(buffer)
    for name, other in changed.items():
        buffer.copy_(other)
        bits = INTEGERS[buffer.element_size()]
        if not torch.equal(buffer.contiguous().view(bits), weight.contiguous().view(bits)):
            assert fingerprint(buffer) != kept, name
    buffer.copy_(weight)
    assert fingerprint(buffer) == kept


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "channels-of-more"])
@pytest.mark.parametrize("k", [1, 3])
def test_swapped_rows_of_one_value_change_the_fingerprint(k, layout, dtype):
    """The sums of rows and columns stay the same: only the value's place in its row differs, for every two places."""
    count = 512
    weight = torch.zeros(count, count, k, k, dtype=dtype)
    weight[:, :, 0, 0].fill_diagonal_(1.0)
    weight = laid_out(weight, layout)
    products = fingerprint(weight).sums[-1].view(-1, count)
    assert len(products.unique(dim=1).t()) == count
    kept = fingerprint(weight)
    for i, j in ((0, 1), (6, 11), (100, 500)):
        weight[[i, j]] = weight[[j, i]]
        assert fingerprint(weight) != kept
        weight[[i, j]] = weight[[j, i]]
    assert fingerprint(weight) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_an_operation_with_swapped_rows(dtype):
    weight, x = torch.zeros(512, 512, 1, 1, dtype=dtype), random(1, 512, 3, 3, dtype=dtype)
    weight[0, 6] = weight[1, 11] = 1
    with torch.no_grad():
        before = conv_bn_relu(x, weight, relu=False)
        weight.data[[0, 1]] = weight.data[[1, 0]]
        after = conv_bn_relu(x, weight, relu=False)
    assert torch.equal(after[:, :2], before[:, [1, 0]])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "channels-of-more"])
def test_the_number_of_threads_makes_no_difference(layout, dtype):
    weight, threads = laid_out(random(600, 64, 3, 3, dtype=dtype), layout), torch.get_num_threads()
    kept = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            kept.append(fingerprint(weight))
    finally:
        torch.set_num_threads(threads)
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (8, 0, 3, 3), (0, 8, 1, 1), (0, 0, 1, 1)], ids=str)
def test_weights_without_values(shape, dtype):
    for layout in ("contiguous", "channels-last", "transposed"):
        check(laid_out(torch.zeros(shape, dtype=dtype), layout))


def test_an_operation_without_outputs():
    with torch.no_grad():
        assert conv_bn_relu(torch.ones(1, 8, 5, 5), torch.ones(0, 8, 1, 1)).shape == (1, 0, 5, 5)
        with pytest.raises(RuntimeError, match="expected weight to be at least 1"):  # PyTorch's own error
            conv_bn_relu(torch.ones(1, 8, 5, 5), torch.ones(0, 8, 3, 3))


@many
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3])),
    dtype=st.sampled_from(ALL_DTYPES),
    layout=st.sampled_from(["contiguous", "channels-last", "strided", "channels-of-more"]),
    index=st.integers(0, 10**6),
    bit=st.integers(0, 63),
    scale=st.sampled_from([0.0, 1.0]),
)
def test_a_single_bit_changes_the_fingerprint(shape, dtype, layout, index, bit, scale):
    out, into, k = shape
    weight = laid_out(random(out, into, k, k).to(dtype) * scale, layout)
    before = fingerprint(weight)
    bits = weight.view(INTEGERS[weight.element_size()])
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index % bits.numel()), bits.shape))
    bits[place] = bits[place] ^ torch.ones((), dtype=bits.dtype).bitwise_left_shift(bit % (8 * bits.element_size()))
    assert fingerprint(weight) != before


@many
@given(
    dtype=st.sampled_from(ALL_DTYPES),
    channels_last=st.booleans(),
    places=st.lists(st.integers(0, 8 * 6 * 9 - 1), min_size=2, max_size=6, unique=True),
    what=st.sampled_from(["swap", "negate", "top bit"]),
    opposite=st.booleans(),
)
def test_several_values_change_the_fingerprint(dtype, channels_last, places, what, opposite):
    """Values are swapped or negated. With `opposite` two values differ in sign alone, so that a swap moves a sign."""
    weight = random(8, 6, 3, 3).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    flat = weight.permute(0, 2, 3, 1).reshape(-1) if channels_last else weight.flatten()
    if opposite:
        flat[places[1]] = -flat[places[0]]
    changed = flat.clone()
    if what == "swap":
        changed[places[:2]] = flat[[places[1], places[0]]]
    elif what == "negate":
        changed[places] = -flat[places]
    else:
        changed[places[:2]] = -flat[places[:2]]
    assume(not torch.equal(changed, flat))

    def as_weight(values: torch.Tensor) -> torch.Tensor:
        return values.view(8, 3, 3, 6).permute(0, 3, 1, 2) if channels_last else values.view(8, 6, 3, 3)

    assert fingerprint(as_weight(flat)) != fingerprint(as_weight(changed))


def test_nan_and_infinity():
    weight = torch.full((4, 4, 3, 3), float("nan"))
    check(weight, count=1)
    check(weight, count=1)
    weight[0, 0, 0, 0] = float("inf")
    check(weight, count=2)


# Keys -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_slices_of_one_weight_do_not_collide(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    whole = random(8, 24, 3, 3).float().contiguous(memory_format=layout)
    whole[:, 8:16] = whole[:, :8]  # equal values at another place in memory have an entry of their own
    for _ in range(2):
        for i in range(3):
            check(whole[:, 8 * i : 8 * i + 8], count=None)
    assert calls.count == 3
    whole[:, 8:16] += 1
    for i in range(3):
        check(whole[:, 8 * i : 8 * i + 8])
    assert calls.count == 4
    check(whole)
    check(whole[:, :8].transpose(0, 1))  # the same place and shape, other strides


def test_each_dtype_and_kind_has_its_pack():
    weight = random(8, 8, 3, 3).float()
    check(weight, torch.float32)
    check(weight, torch.bfloat16)
    check(weight, torch.float64)
    assert len(packed(weight, winograd.pack, torch.float32)) == 2 * 24
    check(weight, torch.float32, count=3)


def test_a_module_in_another_dtype():
    conv = torch.nn.Conv2d(8, 8, 3)
    check(conv.weight)
    conv.to(torch.bfloat16)
    check(conv.weight)
    conv.to(torch.float32)
    check(conv.weight)
    check(conv.weight.detach())  # the same memory
    assert calls.count == 3


def test_a_view_of_the_same_bits_as_another_dtype():
    weight = random(4, 4, 3, 3).bfloat16()
    check(weight, torch.float32)
    check(weight.view(torch.float16), torch.float32)


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_a_pack_is_freed_with_its_weights():
    weight = random(8, 8, 3, 3).float()
    check(weight)
    storage = weight.untyped_storage()._weak_ref()
    del weight
    gc.collect()
    assert torch.UntypedStorage._expired(storage)
    other = random(2, 2, 3, 3).float()
    check(other)
    assert packs.packed_bytes() == other.numel() * 4
    torch.UntypedStorage._free_weak_ref(storage)


def test_memory_that_is_allocated_again():
    for seed in range(50):  # the allocator returns the same addresses
        check(random(8, 8, 3, 3, seed=seed).float(), count=seed + 1)
        check(torch.ones(8, 8, 3, 3), count=None)
        calls.count = seed + 1


def test_packs_are_bounded(monkeypatch):
    monkeypatch.setattr(packs, "MAX_PACKS", 5)
    weights = [random(2, 2, 3, 3, seed=i).float() for i in range(12)]
    for weight in weights:
        check(weight)
        assert packs.packed_bytes() <= 5 * weight.numel() * 4
    assert packs.packed_bytes() == 5 * weights[0].numel() * 4
    for weight in weights:
        check(weight)


def test_packed_bytes_and_clear():
    assert packs.packed_bytes() == 0
    weights = random(8, 8, 3, 3).float(), random(8, 8, 3, 3, seed=1).float()
    check(weights[0], torch.float32)
    check(weights[0], torch.bfloat16)
    packed(weights[1], winograd.pack, torch.float32)
    assert packs.packed_bytes() == 8 * 8 * (9 * 4 + 9 * 2 + 24 * 4)
    packs.clear()
    assert packs.packed_bytes() == 0
    check(weights[0], count=3)


# Modes and threads ----------------------------------------------------------------------------------------------------


def test_weights_and_packs_of_inference_mode():
    with torch.inference_mode():
        weight = random(8, 8, 3, 3).float()
        check(weight, count=1)
        pack = packed(weight, copied, weight.dtype)
        assert not pack.is_inference()
        weight.add_(1)
        check(weight, count=2)
    check(weight, count=2)
    assert not any(part.is_inference() for part in packed(weight, winograd.pack, weight.dtype))


def test_a_pack_made_in_training_requires_no_gradient():
    weight = random(8, 8, 3, 3).requires_grad_()
    pack = packed(weight, copied, weight.dtype)
    assert not pack.requires_grad
    assert pack.data_ptr() != weight.data_ptr()


def test_another_default_device():
    """While another model is built on the meta device, packs stay on the CPU."""
    weight = random(8, 8, 3, 3).float()
    with torch.device("meta"):
        assert all(part.device.type == "cpu" for part in packed(weight, winograd.pack, torch.float32))
        check(weight)


def test_eight_threads():
    weights = [random(8, 8, 3, 3, seed=i).float() for i in range(6)]
    expected = [weight.clone() for weight in weights]

    def work(i: int) -> bool:
        order = [(i + j) % 6 for j in range(60)]
        return all(torch.equal(packed(weights[k], copied, torch.float32), expected[k]) for k in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(32)))
    assert packs.packed_bytes() == sum(weight.numel() * 4 for weight in weights)


def test_eight_threads_while_packs_are_cleared_and_weights_freed(monkeypatch):
    monkeypatch.setattr(packs, "MAX_PACKS", 4)

    def work(i: int) -> bool:
        for j in range(40):
            weight = torch.full((4, 4, 1, 1), float(i * 100 + j))
            if not torch.equal(packed(weight, copied, torch.float32), weight):
                return False
            packs.packed_bytes()
            if j % 10 == 0:
                packs.clear()
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


# The operations themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_no_operation_uses_a_stale_pack(change, dtype):
    if dtype == torch.bfloat16 and change is by_numpy:
        pytest.skip("NumPy has no bfloat16")
    weight = torch.nn.Parameter(random(64, 64, 3, 3).to(dtype))
    x = random(1, 64, 9, 9, seed=1).to(dtype)
    module = importlib.import_module("fastuper_kernels.ops.upsampled_conv3x3")
    with torch.no_grad():
        conv_bn_relu(x, weight)
        upsampled_conv3x3([x], [weight], (18, 18))
    change(weight)
    with torch.no_grad():
        expected = torch.relu(torch.nn.functional.conv2d(x.double(), weight.double(), padding=1))
        assert (conv_bn_relu(x, weight) - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()
        expected = module.reference([x.double()], [weight.double()], (18, 18))
        ours = upsampled_conv3x3([x], [weight], (18, 18))
        assert (ours - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()
