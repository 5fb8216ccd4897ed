"""`over(module)`: any module that returns four maps as a backbone; and weights that two models share."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastuper import ConvNextConfig, UnifiedPerceptualParsingConfig, UperNetConfig
from fastuper import UperNetForSemanticSegmentation as Segmentation
from fastuper import UperNetForUnifiedPerceptualParsing as Parsing
from fastuper.models.backbones import build_backbone
from fastuper.models.backbones.layers import STAGES
from fastuper.weights.errors import CheckpointError
from fastuper.weights.shared import copy_shared_weights
from tests.models.heads import error
from tests.models.test_parsing_configuration import LABELS, PARTS
from tests.models.test_parsing_model import config, images, labels, model
from tests.models.test_upernet import BACKBONES

KINDS = {
    "list": list,
    "tuple": tuple,
    "dict": lambda maps: {str(-i): x for i, x in enumerate(maps)},
    "object": lambda maps: SimpleNamespace(feature_maps=list(maps)),
}
CHANNELS = [4, 6, 8, 10]
VALUES: dict[Any, dict[str, Any]] = {
    Segmentation: {"hidden_size": 8, "auxiliary_channels": 4, "num_labels": 5},
    Parsing: {
        "hidden_size": 8,
        "pool_channels": 4,
        "texture_channels": 4,
        "labels": LABELS,
        "object_parts": PARTS,
    },
}
BOTH = pytest.mark.parametrize("cls", VALUES, ids=lambda cls: cls.__name__)


class Maps(nn.Module):
    """Four convolutions of stride 2, with maps at strides 4, 8, 16, 32."""

    def __init__(self, kind: str = "list", channels: Any = CHANNELS, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.kind = kind
        widths = [3, *channels]
        self.steps = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[i], widths[i + 1], 3, stride=4 if i == 0 else 2, padding=1),
                nn.BatchNorm2d(widths[i + 1]),
                nn.ReLU(),
            )
            for i in range(4)
        )

    def forward(self, x: torch.Tensor) -> Any:
        maps = []
        for step in self.steps:
            x = step(x)
            maps.append(x)
        return KINDS[self.kind](maps)


def over(cls: Any, module: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(1)
    return cls.over(Maps() if module is None else module, **{**VALUES[cls], **options})


def logits(network: Any, x: torch.Tensor) -> torch.Tensor:
    output = network(x)
    return output.object if "object" in output else output.logits


def loss(network: Any, x: torch.Tensor) -> torch.Tensor:
    given = labels()
    return network(x, labels=given if isinstance(network, Parsing) else given["object"]).loss


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_return_four_maps(cls, kind):
    module = Maps(kind).train()
    module.steps[1].eval()
    before = copy.deepcopy(module.state_dict())
    network = over(cls, module)
    assert network.backbone.channels == CHANNELS
    assert [step.training for step in module.steps] == [
        True,
        False,
        True,
        True,
    ]  # until the user calls train() or eval()
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    backbone = network.config.backbone_config
    assert (backbone.model_type, backbone.channels, backbone.class_name) == ("custom", CHANNELS, "Maps")
    network.eval()
    pixels = images(1)
    output = network(pixels, output_hidden_states=True)
    maps = Maps()
    maps.load_state_dict(module.state_dict())
    for ours, theirs in zip(output.hidden_states, maps.eval()(pixels), strict=True):
        assert torch.equal(ours, theirs)
    coarse = network.decode_head(maps(pixels))
    torch.testing.assert_close(
        logits(network, pixels),
        coarse["object"]
        if cls is Parsing
        else nn.functional.interpolate(coarse, size=pixels.shape[2:], mode="bilinear"),
    )


@BOTH
def test_initialize_leaves_the_module_alone(cls):
    network = over(cls)
    before = copy.deepcopy(network.backbone.state_dict())
    classifier = network.decode_head.bottleneck.conv.weight.clone()
    network.initialize()
    network.init_weights()
    assert all(torch.equal(x, before[name]) for name, x in network.backbone.state_dict().items())
    assert not torch.equal(network.decode_head.bottleneck.conv.weight, classifier)


@BOTH
def test_a_configuration_and_values(cls):
    kind = cls.config_class
    given = kind(ConvNextConfig(), **VALUES[cls])
    network = cls.over(Maps(), given, hidden_size=6)
    assert network.config.hidden_size == 6
    assert network.config.id2label == given.id2label
    assert network.config.backbone_config.model_type == "custom"
    assert (given.hidden_size, given.backbone_config.model_type) == (8, "convnext")
    assert cls.over(Maps(), given.to_dict()).config.hidden_size == 8
    named = UperNetConfig(backbone="resnet18", use_timm_backbone=True, auxiliary_channels=4, hidden_size=8)
    if cls is Segmentation:
        assert cls.over(Maps(), named).config.backbone is None
    else:
        with pytest.raises(TypeError, match="expected a UnifiedPerceptualParsingConfig or its dictionary, got Uper"):
            cls.over(Maps(), named)


def test_channels_are_given_instead_of_probed():
    class Picky(Maps):
        def forward(self, x):
            if x.shape[2] != 96:
                raise RuntimeError("96 pixels only")
            return super().forward(x)

    with pytest.raises(ValueError, match=r"Picky refuses an image of \(1, 3, 64, 64\): 96 pixels only; give channels="):
        over(Parsing, Picky())
    network = over(Parsing, Picky(), channels=CHANNELS).eval()
    assert network(images(1, 96, 96)).object.shape == (1, 5, 24, 24)
    for wrong in ([4, 6, 8], [4, 6, 8, 0], [4, 6, 8, "x"]):
        with pytest.raises(ValueError, match="channels must be four whole numbers"):
            over(Parsing, Maps(), channels=wrong)
    with pytest.raises(
        ValueError, match=r"Maps returns maps of \[4, 6, 8, 10\] channels; the model .* \[4, 6, 8, 12\]"
    ):
        over(Parsing, Maps(), channels=[4, 6, 8, 12])(images())


class Returns(nn.Module):
    def __init__(self, make: Any):
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make([nn.functional.avg_pool2d(x, 2**i) for i in range(2, 6)])


WRONG: dict[str, tuple[Any, str]] = {
    "one-map": (lambda maps: maps[0], "must return four feature maps: a list, tuple .*; it returns Tensor"),
    "three-maps": (lambda maps: maps[1:], "must return four feature maps, finest first; it returns 3"),
    "five-maps": (lambda maps: [*maps, maps[3]], "it returns 5"),
    "none": (lambda maps: None, "it returns NoneType"),
    "tokens": (lambda maps: [x.flatten(2) for x in maps], r"\(B, C, H, W\); one of its maps is \(1, 3, 256\)"),
    "no-tensors": (lambda maps: ["a", *maps[1:]], r"\(B, C, H, W\); one of its maps is str"),
    "coarsest-first": (lambda maps: maps[::-1], r"finest first; their sizes are \[\(2, 2\), \(4, 4\), \(8, 8\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_modules_that_return_something_else(case):
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as caught:
        over(Parsing, Returns(make))
    assert "\n" not in str(caught.value)
    assert "Returns" in str(caught.value)


def test_no_module():
    with pytest.raises(TypeError, match=r"the backbone must be a torch\.nn\.Module, got str"):
        Parsing.over("resnet")


@BOTH
def test_a_value_that_the_configuration_lacks(cls):
    with pytest.raises(TypeError, match="Config has no hiden_size"):
        over(cls, hiden_size=8)


def test_maps_that_change_are_refused():
    network = over(Segmentation).eval()
    network(images(1))
    network.backbone.module.steps[3] = nn.Conv2d(8, 9, 3, stride=2)
    with pytest.raises(ValueError, match=r"Maps returns maps of \[4, 6, 8, 9\] channels; the model was built for"):
        network(images(1))
    with pytest.raises(ValueError, match="a user's module gives no attentions; leave output_attentions out"):
        network(images(1), output_attentions=True)


@BOTH
def test_save_and_load(cls, tmp_path):
    network = over(cls).eval()
    network.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["backbone_config"]
    assert saved == {"model_type": "custom", "channels": CHANNELS, "class_name": "Maps"}
    module = Maps(seed=5)
    loaded = cls.from_pretrained(tmp_path, backbone=module)
    assert loaded.backbone.module is module
    assert torch.equal(logits(loaded, images(1)), logits(network, images(1)))
    message = "the backbone is a user's module of the class 'Maps', which .* cannot build: pass backbone=, the module"
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        cls(network.config)


@BOTH
def test_a_module_that_does_not_fit(cls, tmp_path):
    over(cls).save_pretrained(tmp_path)
    other = Maps(channels=[4, 6, 8, 12])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match=r"other shapes.*\n.*backbone\.module\.steps\.3\.0\.bias: \(10,\) in"):
        cls.from_pretrained(tmp_path, backbone=other)
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())
    with pytest.raises(CheckpointError, match=r"tensors are missing, such as backbone\.module\.0\."):
        cls.from_pretrained(tmp_path, backbone=nn.Sequential(nn.Conv2d(3, 4, 1)))
    model_ = cls(cls.config_class(BACKBONES["convnext"](), **VALUES[cls]))
    model_.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describes a 'convnext' backbone, which is built from it: leave out"):
        cls.from_pretrained(tmp_path, backbone=Maps())


@BOTH
def test_training(cls):
    network = over(cls).train()
    loss(network, images()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network.backbone.module.steps[0][1].num_batches_tracked == 1


@BOTH
def test_gradient_checkpointing_recomputes_the_module(cls):
    ways, calls = [over(cls, Maps()).train().double() for _ in range(2)], []
    ways[1].gradient_checkpointing_enable()
    ways[1].backbone.module.register_forward_pre_hook(lambda *_: calls.append(1))
    for network in ways:
        loss(network, images().double()).backward()
    assert len(calls) == 2
    for (name, first), second in zip(ways[0].named_parameters(), ways[1].parameters(), strict=True):
        assert error(second.grad, first.grad) < 1e-10, name
    norms = [network.backbone.module.steps[0][1] for network in ways]
    assert torch.equal(norms[0].running_mean, norms[1].running_mean)


def test_our_backbones_are_modules_too():
    ours = build_backbone(ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], out_features=STAGES)).eval()
    network = over(Parsing, ours).train()
    network.gradient_checkpointing_enable()
    loss(network, images()).backward()
    assert any(p.grad is not None for p in ours.parameters())


@BOTH
def test_deepcopy(cls):
    network = over(cls).eval()
    again = copy.deepcopy(network)
    assert again.backbone.module is not network.backbone.module
    assert torch.equal(logits(again, images(1)), logits(network, images(1)))


@pytest.fixture
def forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Parsing, {"tasks": ["scene"]}),  # tests/models/test_parsing_head.py traces the other tasks
        pytest.param(Parsing, {}, marks=pytest.mark.exhaustive),
        pytest.param(Segmentation, {}, marks=pytest.mark.exhaustive),
    ],
    ids=["scene", "parsing", "segmentation"],
)
def test_compile(cls, options):
    network = over(cls).eval()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        for name, x in network(images(1), **options).items():
            torch.testing.assert_close(compiled(images(1), **options)[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_export_with_dynamic_sizes():
    network, sizes = over(Parsing).eval(), dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    with torch.no_grad():
        program = torch.export.export(network, (images(),), dynamic_shapes={"pixel_values": sizes}).module()
        for size in ((2, 64, 80), (3, 97, 70)):
            for name, x in network(images(*size)).items():
                torch.testing.assert_close(program(images(*size))[name], x, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- shared weights


def segmentation(**values: Any) -> Segmentation:
    torch.manual_seed(3)
    given = {"hidden_size": 12, "auxiliary_channels": 4, "num_labels": 5, **values}
    return Segmentation(UperNetConfig(BACKBONES["convnext"](), **given)).eval()


@pytest.mark.parametrize("to_parsing", [True, False], ids=["to-parsing", "to-segmentation"])
def test_shared_weights_are_copied(to_parsing):
    parsing = model(pool_channels=12, pooling="adaptive", resample_first=False)
    pair = (segmentation(), parsing)
    source, target = pair if to_parsing else pair[::-1]
    old = copy.deepcopy(target.state_dict())
    result = copy_shared_weights(source, target)
    new = target.state_dict()
    assert set(result.copied) | set(result.kept) == set(new)
    assert set(result.copied) | set(result.unused) == set(source.state_dict())
    assert all(torch.equal(new[name], source.state_dict()[name]) for name in result.copied)
    assert all(torch.equal(new[name], old[name]) for name in result.kept)
    inner = {name.split(".")[1] for name in result.copied if name.startswith("decode_head.")}
    assert inner == {"psp_modules", "bottleneck", "lateral_convs", "fpn_convs", "fpn_bottleneck"}
    assert {name for name in new if name.startswith("backbone.")} <= set(result.copied)
    others = {name.split(".")[1] for name in (*result.kept, *result.unused) if name.startswith("decode_head.")}
    assert others == {"classifier", "scene_head", "object_head", "part_head", "material_head", "texture_head"}
    # The networks up to the fused map are then the same.
    maps = [network.backbone(images(1)).feature_maps for network in (source, target)]
    fused = []
    for network, own in zip((source, target), maps, strict=True):
        head = network.decode_head
        fused.append(head.fuse(head.smooth(head.top_down(own[:-1], head.psp_forward(own)))))
    torch.testing.assert_close(fused[0], fused[1])


def test_other_shapes_are_refused():
    source, target = segmentation(hidden_size=8), model()
    old = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointError, match=r"shared tensors differ in shape, such as decode_head\.bottle") as e:
        copy_shared_weights(source, target)
    assert "\n" not in str(e.value)
    assert all(torch.equal(x, old[name]) for name, x in target.state_dict().items())
    with pytest.raises(CheckpointError, match="share no tensors of a backbone or pyramid"):
        copy_shared_weights(nn.Linear(2, 2), target)


def test_other_backbones_share_the_pyramid():
    own = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    source = Segmentation(UperNetConfig(ConvNextConfig(**own), hidden_size=12, auxiliary_channels=4))
    swin = Parsing(config("swin", pool_channels=12))
    with pytest.raises(CheckpointError, match="shared tensors differ in shape"):
        copy_shared_weights(source, swin)
    same = over(Parsing, Maps(channels=[8, 8, 16, 16]), hidden_size=12, pool_channels=12)
    result = copy_shared_weights(source, same)
    assert not any(name.startswith("backbone.") for name in result.copied)
    assert any(name.startswith("backbone.module.") for name in result.kept)
    assert torch.equal(same.decode_head.bottleneck.conv.weight, source.decode_head.bottleneck.conv.weight)


def test_the_configuration_of_a_custom_backbone_is_one_of_two():
    with pytest.raises(ValueError, match="which a configuration cannot build"):
        Parsing(UnifiedPerceptualParsingConfig({"model_type": "custom", "channels": [1, 2, 3, 4], "class_name": "A"}))
