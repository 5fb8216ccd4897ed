"""Replaced, hooked or wrapped modules are called, and their results are used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune

import fastuper.models.heads.strips
from fastuper.models.heads.conv_module import ConvModule, is_fusible
from fastuper.models.untouched import is_untouched
from tests.models.heads import as_written, error, feature_maps, head, randomize

CALLED = [name for name, module in head().named_modules() if type(module) is not nn.ModuleList]
# One module of each kind whose result is one map; of several, the first and the last.
MODULES = [name for name in CALLED if name != "psp_modules"]
MODULES = [name for name in MODULES if not name.startswith(("psp_modules.0", "psp_modules.2", "psp_modules.3"))]
MODULES = [name for name in MODULES if not name.startswith(("lateral_convs.1", "fpn_convs.1", "fpn_convs.2."))]
CONVOLUTIONS = [
    "fpn_bottleneck.conv",
    "bottleneck.conv",
    "lateral_convs.0.conv",
    "lateral_convs.2.conv",
    "fpn_convs.0.conv",
    "psp_modules.1.1.conv",
    "classifier",
]


@pytest.fixture(params=[False, True], ids=["whole", "strips"])
def strips(request, monkeypatch):
    """Run each test once with whole maps, and once with maps large enough for strips."""
    if request.param:
        monkeypatch.setattr(fastuper.models.heads.strips, "STRIP_BYTES", 1)
    return request.param


def check(model, original=None, tolerance=2e-6):
    """Compare a head with its modules called one by one, and check that its change matters to the result."""
    maps = feature_maps()
    with torch.no_grad():
        result, expected = model(maps), as_written(model, maps)
        assert error(result, expected) < tolerance
        if original is not None:
            assert error(original(maps), expected) > 1e-3
    with torch.inference_mode():
        assert error(model(maps), expected) < tolerance
    return result


def place(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_taken(model):
    """Return True if the hand-written path is taken for every convolution of a head."""
    modules = [module for module in model.modules() if isinstance(module, ConvModule)]
    with torch.no_grad():
        return all(is_fusible(module) and module.is_foldable() for module in modules)


def test_an_untouched_head(strips):
    model = head()
    assert is_taken(model)
    check(model)


# Hooks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_forward_hooks(name, strips):
    """The value that a hook returns replaces the module's result."""
    original, calls = head(), []
    model = copy.deepcopy(original)

    def hook(module, args, output):
        calls.append(tuple(output.shape))
        return output * 1.5 + 0.25

    handle = model.get_submodule(name).register_forward_hook(hook)
    maps = feature_maps()
    with torch.no_grad():
        result = model(maps)
    assert len(calls) == 1
    if name:  # the hook of the head itself is not called by `as_written`
        check(model, original)
    else:
        assert error(result, original(maps) * 1.5 + 0.25) < 2e-6
    handle.remove()
    assert is_taken(model)
    assert torch.equal(check(model), check(original))


def test_hooks_on_the_pyramid_pooling(strips):
    """The module's input is the last map, its result a map of that size for each branch."""
    original, seen = head(), []
    model = copy.deepcopy(original)
    model.psp_modules.register_forward_pre_hook(lambda module, args: (args[0] * 0.5 + 0.1,))
    model.psp_modules.register_forward_hook(lambda module, args, maps: seen.append(maps) or [2 * x for x in maps])
    check(model, original)
    assert all(x.shape == (2, 12, 3, 3) for maps in seen for x in maps)
    assert [len(maps) for maps in seen] == [4, 4, 4]


@pytest.mark.parametrize("levels", [True, False])
@pytest.mark.parametrize("pooling", [True, False])
def test_align_corners(levels, pooling, strips):
    """Both flags may be set by hand, as in Transformers."""
    model, maps = head(), feature_maps()
    model.align_corners, model.psp_modules.align_corners = levels, pooling
    with torch.no_grad():
        result, plain = model(maps), head()(maps)
        expected = as_written(model, maps)
    assert error(result, expected) < 2e-6
    assert (error(result, plain) > 1e-4) == levels


@pytest.mark.parametrize("name", MODULES[1:])
def test_forward_pre_hooks(name, strips):
    """A hooked module gets the same input as in the network as written: the fusion gets concatenated levels."""
    original, channels = head(), []
    model = copy.deepcopy(original)

    def hook(module, args):
        channels.append(args[0].shape[1])
        return (args[0] * 0.5 + 0.1,)

    module = model.get_submodule(name)
    module.register_forward_pre_hook(hook)
    check(model, original)
    assert len(set(channels)) == 1
    if isinstance(module, nn.Conv2d):
        assert channels[0] == module.in_channels


@pytest.mark.parametrize("name", MODULES[1:])
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks(name, kind):
    model, calls = head(), []
    expected = copy.deepcopy(model)
    for network in (model, expected):
        hook = {
            "register_full_backward_hook": lambda module, inputs, outputs: calls.append(1) or (inputs[0] * 3,),
            "register_full_backward_pre_hook": lambda module, outputs: calls.append(1) or (outputs[0] * 3,),
        }[kind]
        getattr(network.get_submodule(name), kind)(hook)
    maps, same = ([x.requires_grad_() for x in feature_maps()] for _ in range(2))
    model(maps).square().sum().backward()
    assert len(calls) == 1
    as_written(expected, same).square().sum().backward()
    for ours, theirs in zip([*maps, *model.parameters()], [*same, *expected.parameters()], strict=True):
        assert error(ours.grad, theirs.grad) < 1e-4


@pytest.mark.parametrize(
    ("register", "hook"),
    [
        (torch_module.register_module_forward_hook, lambda seen: lambda module, args, output: seen.append(module)),
        (torch_module.register_module_forward_pre_hook, lambda seen: lambda module, args: seen.append(module)),
    ],
    ids=["forward", "pre"],
)
def test_hooks_on_all_modules(register, hook, strips):
    model, seen = head(), []
    handle = register(hook(seen))
    try:
        with torch.no_grad():
            model(feature_maps())
    finally:
        handle.remove()
    assert {id(module) for module in seen} == {id(model.get_submodule(name)) for name in CALLED}
    assert is_taken(model)


def test_feature_extraction_gets_every_map():
    """Hooks that return nothing, such as those of feature extractors and of torchinfo."""
    model, seen = head(), {}
    for name in MODULES[1:]:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output})
        )
    with torch.no_grad():
        result = model(feature_maps())
    assert set(seen) == set(MODULES[1:])
    assert seen["fpn_bottleneck.conv"].shape == (2, 12, 17, 22)
    assert torch.equal(seen["classifier"], result)


# Replaced functions and modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES[1:])
def test_forward_replaced_on_the_instance(name, strips):
    original = head()
    model = copy.deepcopy(original)
    module = model.get_submodule(name)
    kept = module.forward
    module.forward = lambda x: kept(x) * 1.5 + 0.25
    check(model, original)
    module.forward = kept  # the state in which accelerate leaves a module when it removes its hooks
    assert is_untouched(module)
    assert torch.equal(check(model), check(original))
    module.forward = original.get_submodule(name).forward  # another instance's
    assert not is_untouched(module)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_subclassed_convolutions(name, strips):
    original = head()
    model = copy.deepcopy(original)
    model.get_submodule(name).__class__ = Doubled
    check(model, original)


REPLACED_CONVOLUTIONS = {
    "bias": lambda i, o, k: nn.Conv2d(i, o, k, padding=k // 2),
    "reflect": lambda i, o, k: nn.Conv2d(i, o, k, padding=k // 2, padding_mode="reflect", bias=False),
    "five": lambda i, o, k: nn.Conv2d(i, o, 5, padding=2, bias=False),
    "dilated": lambda i, o, k: nn.Conv2d(i, o, 3, padding=2, dilation=2, bias=False),
    "groups": lambda i, o, k: nn.Conv2d(i, o, k, padding=k // 2, groups=4, bias=False),
    "same": lambda i, o, k: nn.Conv2d(i, o, k, padding="same", bias=False),
    "separable": lambda i, o, k: nn.Sequential(nn.Conv2d(i, i, 3, padding=1, groups=i), nn.Conv2d(i, o, 1)),
}


@pytest.mark.parametrize("name", ["fpn_bottleneck.conv", "lateral_convs.0.conv", "fpn_convs.0.conv"])
@pytest.mark.parametrize("kind", REPLACED_CONVOLUTIONS)
def test_other_convolutions(name, kind, strips):
    model = head()
    old = model.get_submodule(name)
    new = REPLACED_CONVOLUTIONS[kind](old.in_channels, old.out_channels, old.kernel_size[0])
    place(model, name, randomize(new))
    check(model, head())


NORMS = {
    "identity": lambda n: nn.Identity(),
    "group": lambda n: nn.GroupNorm(3, 12),
    "sync": lambda n: nn.SyncBatchNorm(12),
    "no-statistics": lambda n: nn.BatchNorm2d(12, track_running_stats=False),
    "not-affine": lambda n: nn.BatchNorm2d(12, affine=False),
    "cumulative": lambda n: nn.BatchNorm2d(12, momentum=None),
    "subclass": lambda n: Centred(12),
}


class Centred(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) - 0.25


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_other_norms(kind, training, strips):
    model = head().train(training)
    for module in list(model.modules()):
        if isinstance(module, ConvModule):
            module.batch_norm = randomize(NORMS[kind](12)).train(training)
    other, maps = copy.deepcopy(model), feature_maps()
    with torch.no_grad():
        assert error(model(maps), as_written(other, maps)) < 4e-6
    for (name, ours), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6), name


def test_convert_sync_batchnorm(strips):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(head())
    assert is_taken(model)
    assert all(is_fusible(module) for module in model.lateral_convs)
    assert error(check(model), check(head())) < 2e-6


@pytest.mark.parametrize("kind", [nn.GELU, nn.ReLU6, nn.Identity, lambda: nn.LeakyReLU(0.1)])
def test_other_activations(kind, strips):
    model = head()
    for module in list(model.modules()):
        if isinstance(module, ConvModule):
            module.activation = kind()
    check(model)


@pytest.mark.parametrize(
    "classifier",
    [
        nn.Conv2d(12, 5, 3, padding=1),
        nn.Conv2d(12, 5, 1, stride=2),
        nn.Conv2d(12, 5, 1, padding=1),
        nn.Conv2d(12, 9, 1, bias=False),
        nn.Sequential(nn.Dropout2d(0.5), nn.Conv2d(12, 5, 1)),
        nn.Sequential(nn.Conv2d(12, 12, 5, padding=2), nn.ReLU(), nn.Conv2d(12, 3, 1)),
    ],
    ids=["3x3", "stride", "padded", "nine-classes", "dropout", "two-layers"],
)
def test_other_classifiers(classifier, strips):
    model = head()
    model.classifier = copy.deepcopy(classifier).eval()
    check(model)


@pytest.mark.parametrize("name", ["fpn_bottleneck", "bottleneck", "lateral_convs.1", "fpn_convs.0", "psp_modules.2.1"])
def test_other_blocks(name, strips):
    model, original = head(), head()
    old = model.get_submodule(name).conv
    place(model, name, nn.Sequential(randomize(nn.Conv2d(old.in_channels, 12, 3, padding=1)), nn.GELU()))
    check(model, original)


BLOCKS = ["fpn_bottleneck", "bottleneck", "lateral_convs.0", "lateral_convs.1", "fpn_convs.0", "fpn_convs.1"]


@pytest.mark.parametrize("name", [*BLOCKS, "psp_modules.2.1"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_blocks_of_other_kernels(name, kernel_size, strips):
    model, original = head(), head()
    new = ConvModule(model.get_submodule(name).conv.in_channels, 12, kernel_size)
    place(model, name, randomize(new, seed=1).eval())
    check(model, original)
    maps, other = feature_maps(), copy.deepcopy(model.train())
    model(maps).square().mean().backward()
    as_written(other, maps).square().mean().backward()
    assert error(new.conv.weight.grad, other.get_submodule(name).conv.weight.grad) < 1e-4


def test_branches_of_several_widths(strips):
    model = head()
    model.psp_modules[1][1] = randomize(ConvModule(24, 7, 1)).eval()
    model.bottleneck = randomize(ConvModule(24 + 3 * 12 + 7, 12, 3)).eval()
    check(model)


def test_levels_of_several_widths(strips):
    model = head()
    model.fpn_convs[0] = randomize(ConvModule(12, 9, 3)).eval()
    model.fpn_bottleneck = randomize(ConvModule(9 + 36, 12, 3)).eval()
    check(model)


def test_other_pooling(strips):
    model, original = head(), head()
    model.psp_modules[1] = nn.Sequential(nn.AdaptiveMaxPool2d(2), model.psp_modules[1][1])
    check(model, original)
    model.psp_modules[2] = nn.Sequential(nn.AdaptiveAvgPool2d((3, 2)), nn.Dropout(), model.psp_modules[2][1]).eval()
    check(model, original)


# Wrapped and rearranged weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_pruning(name, strips):
    original = head()
    model = copy.deepcopy(original)
    prune.random_unstructured(model.get_submodule(name), "weight", amount=0.5)
    check(model, original)
    prune.remove(model.get_submodule(name), "weight")
    assert is_taken(model)
    check(model, original)


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old-weight_norm": nn.utils.weight_norm,
    "custom": lambda module: parametrize.register_parametrization(module, "weight", Scaled()),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_parametrizations(name, kind, strips):
    original = head()
    model = copy.deepcopy(original)
    PARAMETRIZATIONS[kind](model.get_submodule(name))
    model.eval()
    for parameter in model.get_submodule(name).parameters():
        parameter.data.mul_(1.3)
    if name != "classifier":
        assert not is_taken(model)
    check(model, None if kind == "spectral_norm" else original)


class Quantised(torch.Tensor):
    """A weight whose class changes the convolution: its result is doubled."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.nn.functional.conv2d or function is torch.conv2d:
            return 2 * torch.Tensor(result)
        return result


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_weights_of_tensor_subclasses(name, strips):
    original = head()
    model = copy.deepcopy(original)
    module = model.get_submodule(name)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Quantised))
    if name != "classifier":
        assert not is_taken(model)
    maps = feature_maps()
    with torch.no_grad():
        result, expected = torch.Tensor(model(maps)), torch.Tensor(as_written(model, maps))
    assert error(result, expected) < 2e-6
    assert error(original(maps), expected) > 1e-3


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_lora(name, strips):
    peft = pytest.importorskip("peft")
    original = head()
    model = copy.deepcopy(original)
    config = peft.LoraConfig(r=3, target_modules=f".*{name}" if "." in name else [name], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    assert any("lora_A" in parameter for parameter, _ in model.named_parameters())
    model.eval()
    check(model, original)
    layer = model.get_submodule(name)
    layer.merge()
    check(model, original)
    layer.unmerge()
    model.train()
    model(feature_maps()).sum().backward()
    trained = [parameter for parameter, value in model.named_parameters() if value.grad is not None]
    assert trained
    assert all("lora_" in parameter for parameter in trained)


def test_lora_on_every_convolution_merged_into_them(strips):
    peft = pytest.importorskip("peft")
    original = head()
    config = peft.LoraConfig(r=3, target_modules=["conv"], modules_to_save=["classifier"], init_lora_weights=False)
    wrapped = peft.PeftModel(copy.deepcopy(original), config).eval()
    adapted = check(wrapped.base_model.model, original)
    merged = wrapped.merge_and_unload()
    assert is_taken(merged)
    assert error(check(merged, original), adapted) < 2e-6


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offloading(kind, strips, tmp_path):
    """Between calls the weights are on the meta device; hooks load the weights of each module."""
    accelerate = pytest.importorskip("accelerate")
    original, maps = head(), feature_maps()
    model = copy.deepcopy(original)
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu", offload_buffers=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    for _ in range(2):
        with torch.no_grad():
            assert error(model(maps), original(maps)) < 2e-6
    if kind == "cpu":
        accelerate.hooks.remove_hook_from_submodules(model)
        assert is_taken(model)
        assert torch.equal(check(model), check(original))


def test_fused_convolutions_and_norms(strips):
    """The result of `torch.nn.utils.fusion`: a convolution with a bias, and no norm."""
    model = head()
    for module in list(model.modules()):
        if isinstance(module, ConvModule):
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.batch_norm)
            module.batch_norm = nn.Identity()
    assert error(check(model), check(head())) < 4e-6
