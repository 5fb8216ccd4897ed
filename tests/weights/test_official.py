"""Unified Perceptual Parsing's official weights: names, files, faults, and models built from them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench.numerics import error
from fastuper import (
    ConvNextConfig,
    DeepStemResNetConfig,
    UnifiedPerceptualParsingConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    UperNetForUnifiedPerceptualParsing,
)
from fastuper.weights.errors import CheckpointError
from fastuper.weights.official import TEMPORARY, decoder_name, encoder_name, load_parsing
from tests.parity.parsing_reference import State, official_state, reference_decoder, reference_encoder

STAGES = ["stage1", "stage2", "stage3", "stage4"]
LABELS = {
    "scene": ["field", "street", "room"],
    "object": ["-", "sky", "house", "person"],
    "part": ["-", "roof", "head", "arm", "cloud"],
    "material": ["-", "wood", "stone"],
}
PARTS = {2: (1,), 3: (3, 2)}  # house: roof; person: arm, head
CHANNELS = {"scene": 3, "object": 4, "part": 5, "material": 3}
BLOCKS = [1, 2, 1, 1]
PIXELS = torch.randn(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))


def states(temporary: bool = False, dtype: torch.dtype = torch.float32, **values: Any) -> tuple[State, State]:
    values = {"classes": CHANNELS, "blocks": BLOCKS, **values}
    return official_state(torch.Generator().manual_seed(1), temporary=temporary, dtype=dtype, **values)


def config(**values: Any) -> UnifiedPerceptualParsingConfig:
    backbone = DeepStemResNetConfig([4, 6, 8], hidden_sizes=[16, 24, 32, 40], depths=BLOCKS, out_features=STAGES)
    values = {"hidden_size": 16, "pool_channels": 16, "texture_channels": 8, **values}
    return UnifiedPerceptualParsingConfig(backbone, labels=LABELS, object_parts=PARTS, **values)


def build(**values: Any) -> UperNetForUnifiedPerceptualParsing:
    torch.manual_seed(0)
    return UperNetForUnifiedPerceptualParsing(config(**values)).eval()


def saved(folder: Path, encoder: State, decoder: State, epoch: int = 40) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(encoder, folder / f"encoder_epoch_{epoch}.pth")
    torch.save(decoder, folder / f"decoder_epoch_{epoch}.pth")
    return folder


def values_of(model: torch.nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: torch.nn.Module, before: State) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("temporary", [False, True])
def test_logits_are_the_official_ones(temporary):
    """In float64, against the official network stated again with the official names."""
    encoder, decoder = states(temporary, torch.float64)
    model = build().double()
    report = load_parsing(model, encoder, decoder)
    with torch.no_grad():
        found = model(PIXELS.double())
        maps = reference_encoder(encoder, PIXELS.double())
        expected = reference_decoder(decoder, maps)
    for task in CHANNELS:
        assert error(found[task], expected[task]) < 1e-10, task
    norms = sum(name.endswith(".running_mean") for name in (*encoder, *decoder))
    assert report.left_out == (dict.fromkeys(TEMPORARY, norms) if temporary else {})
    assert report.kept == ("decode_head.texture_head",)
    counted = [sum(not name.endswith(TEMPORARY) for name in state) for state in (encoder, decoder)]
    assert report.loaded == {"encoder": counted[0], "decoder": counted[1]}
    assert "kept the values of decode_head.texture_head" in str(report)


def test_names_and_shapes_of_the_official_network():
    """The default configuration has the tensors of the official ResNet-50, as its code builds them."""
    with torch.device("meta"):
        model = UperNetForUnifiedPerceptualParsing(UnifiedPerceptualParsingConfig())
    encoder = {encoder_name(name): x.shape for name, x in model.backbone.state_dict().items()}
    decoder = {decoder_name(name): x.shape for name, x in model.decode_head.state_dict().items()}
    texture = decoder.pop(None)
    assert texture is not None
    assert (len(encoder), len(decoder)) == (330, 104)  # 495 and 152 with the three sums of each BatchNorm
    assert encoder["conv3.weight"] == (128, 64, 3, 3)
    assert encoder["layer3.0.downsample.0.weight"] == (1024, 512, 1, 1)
    assert encoder["layer4.2.bn3.running_var"] == (2048,)
    for name, shape in {
        "ppm_conv.3.0.weight": (512, 2048, 1, 1),
        "ppm_last_conv.0.weight": (512, 4096, 3, 3),
        "fpn_in.2.0.weight": (512, 1024, 1, 1),
        "fpn_out.2.0.0.weight": (512, 512, 3, 3),
        "fpn_out.0.0.1.running_mean": (512,),
        "conv_fusion.0.weight": (512, 2048, 3, 3),
        "conv_fusion.1.bias": (512,),
        "scene_head.0.0.weight": (512, 512, 3, 3),
        "scene_head.2.weight": (365, 512, 1, 1),
        "object_head.0.1.running_var": (512,),
        "object_head.1.bias": (336,),
        "part_head.1.weight": (427, 512, 1, 1),
        "material_head.1.weight": (26, 512, 1, 1),
    }.items():
        assert decoder[name] == shape, name


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_one_file_alone(part):
    model = build()
    before = values_of(model)
    state = dict(zip(("encoder", "decoder"), states(), strict=True))[part]
    report = load_parsing(model, **{part: state})
    own = "backbone." if part == "encoder" else "decode_head."
    for name, tensor in model.state_dict().items():
        loads = name.startswith(own) and "texture_head" not in name and not name.endswith("num_batches_tracked")
        assert torch.equal(tensor, before[name]) != loads, name
    assert list(report.loaded) == [part]
    assert report.kept == (("decode_head",) if part == "encoder" else ("backbone", "decode_head.texture_head"))


@pytest.mark.parametrize("kind", ["pth", "pth of DataParallel", "safetensors", "state dict"])
def test_every_kind_of_source(kind, tmp_path):
    encoder, decoder = states(temporary=True)
    expected = build()
    load_parsing(expected, encoder, decoder)
    if kind == "pth of DataParallel":
        encoder, decoder = ({f"module.{name}": x for name, x in state.items()} for state in (encoder, decoder))
    sources: list[Any] = [encoder, decoder]
    if kind == "safetensors":
        sources = [tmp_path / "encoder_epoch_1.safetensors", tmp_path / "decoder_epoch_1.safetensors"]
        for state, path in zip((encoder, decoder), sources, strict=True):
            save_file(state, path)
    elif kind != "state dict":
        saved(tmp_path, encoder, decoder)
        sources = [str(tmp_path / "encoder_epoch_40.pth"), tmp_path / "decoder_epoch_40.pth"]
    model = build()
    load_parsing(model, *sources)
    assert unchanged(model, values_of(expected))


def test_tensors_keep_their_identity_dtype_and_memory_format():
    model = build().to(torch.bfloat16, memory_format=torch.channels_last)
    before = model.state_dict(keep_vars=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    encoder, decoder = states()
    load_parsing(model, encoder, decoder)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is before[name] for name in before)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    weight = model.backbone.embedder.embedder[1].convolution.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, encoder["conv2.weight"].bfloat16())


def test_heads_of_other_tasks_are_left_out():
    encoder, decoder = states()
    model = build(tasks=["object", "texture"])
    report = load_parsing(model, encoder, decoder)
    assert report.left_out == {"scene_head": 7, "part_head": 7, "material_head": 7}
    assert "left out 7 tensors scene_head: the model has no such head" in str(report)


def test_the_pyramid_of_semantic_segmentation():
    """Where modules are the same, weights fit, and the parsing model's own names fit too."""
    encoder, decoder = states()
    backbone = config().backbone_config
    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone, hidden_size=16, num_labels=4, auxiliary_channels=8, auxiliary_in_channels=32)
    )
    report = load_parsing(model, encoder, decoder)
    assert report.kept == ("auxiliary_head", "decode_head.classifier")
    assert report.left_out == dict.fromkeys(["scene_head", "object_head", "part_head", "material_head"], 7)
    parsing = build()
    load_parsing(parsing, encoder, decoder)
    shared = {name: x for name, x in parsing.state_dict().items() if "_head.conv." not in name}
    shared = {name: x for name, x in shared.items() if name in model.state_dict()}
    assert len(shared) > 150
    assert all(torch.equal(model.state_dict()[name], x) for name, x in shared.items())


# Faults ---------------------------------------------------------------------------------------------------------------


def broken(encoder: State, decoder: State, fault: str) -> tuple[Any, Any]:
    if fault == "missing":
        del encoder["layer2.1.bn3.running_var"]
    elif fault == "foreign":
        decoder["deepsup.0.weight"] = torch.zeros(2, 2)
    elif fault == "texture":
        decoder["texture_head.0.0.weight"] = torch.zeros(2, 2)
    elif fault == "shape":
        encoder["layer1.0.conv2.weight"] = torch.zeros(4, 1, 3, 3)
    elif fault == "integers":
        decoder["fpn_in.1.0.weight"] = decoder["fpn_in.1.0.weight"].char()
    elif fault == "nested":
        encoder = {"state_dict": encoder}  # type: ignore[dict-item]
    elif fault == "exchanged":
        encoder, decoder = decoder, encoder
    elif fault == "other names":
        encoder = {"stem.0.weight": torch.zeros(2)}
    elif fault == "empty":
        decoder = {}
    elif fault == "buffer without a norm":
        decoder["fpn_in.1.2._running_iter"] = torch.zeros(1)
    return encoder, decoder


FAULTS = {
    "missing": r"encoder_epoch_40.pth lacks 1 of the model's tensors \(layer2.1.bn3.running_var\)",
    "foreign": r"decoder_epoch_40.pth has 1 tensors that the model lacks \(deepsup.0.weight\)",
    "texture": r"decoder_epoch_40.pth has 1 tensors that the model lacks \(texture_head.0.0.weight\)",
    "buffer without a norm": r"decoder_epoch_40.pth has 1 tensors that the model lacks \(fpn_in.1.2._running_iter\)",
    "shape": r"encoder_epoch_40.pth: layer1.0.conv2.weight has shape \(4, 1, 3, 3\), in the model \(4, 4, 3, 3\)",
    "integers": r"decoder_epoch_40.pth: 'fpn_in.1.0.weight' is torch.int8, where a tensor of floats is expected",
    "nested": "encoder_epoch_40.pth does not hold a dict of tensors .*state_dict",
    "exchanged": r"encoder_epoch_40.pth is no official encoder: .* are an official decoder's: pass it as decoder=",
    "other names": "encoder_epoch_40.pth is no official encoder: .*not the official code's",
    "empty": "decoder_epoch_40.pth holds no tensors",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_is_refused(fault, tmp_path):
    """One line names the file, and the model stays as it was; both files are checked before one is loaded."""
    saved(tmp_path, *broken(*states(temporary=True), fault))
    model = build()
    before = values_of(model)
    with pytest.raises(CheckpointError, match=FAULTS[fault]) as caught:
        load_parsing(model, tmp_path / "encoder_epoch_40.pth", tmp_path / "decoder_epoch_40.pth")
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks": [1, 2, 3, 1]}, r"has \[1, 2, 3, 1\] blocks, the model \[1, 2, 1, 1\]: set depths=\[1, 2, 3, 1\]"),
        ({"hidden_size": 8}, "has 8 hidden_size, the model 16"),
        ({"pool_channels": 8}, "has 8 pool_channels, the model 16"),
        ({"classes": {**CHANNELS, "object": 9}}, "has 9 object channels, the model 4: give the model the labels"),
        ({"classes": {**CHANNELS, "scene": 2}}, "has 2 scene channels, the model 3"),
        ({"classes": {"scene": 3}}, "lacks 21 of the model's tensors"),
    ],
)
def test_another_network_is_refused(values, message):
    model = build()
    before = values_of(model)
    with pytest.raises(CheckpointError, match=message):
        load_parsing(model, *states(**values))
    assert unchanged(model, before)


def test_another_backbone_is_refused():
    backbone = ConvNextConfig(hidden_sizes=[16, 24, 32, 40], depths=[1] * 4, out_features=STAGES)
    model = UperNetForUnifiedPerceptualParsing(
        UnifiedPerceptualParsingConfig(backbone, 16, 16, labels=LABELS, object_parts=PARTS, texture_channels=8)
    )
    encoder, decoder = states()
    with pytest.raises(CheckpointError, match=r"ResNet with a deep stem, the model's backbone a convnext; .* only the"):
        load_parsing(model, encoder, decoder)
    assert load_parsing(model, decoder=decoder).kept == ("backbone", "decode_head.texture_head")


def test_wrong_arguments(tmp_path):
    encoder, decoder = states()
    with pytest.raises(ValueError, match="needs an encoder, a decoder, or both"):
        load_parsing(build())
    with pytest.raises(TypeError, match="expected a model with backbone and decode_head, got Linear"):
        load_parsing(torch.nn.Linear(1, 1), encoder)
    with pytest.raises(TypeError, match="encoder must be a path or a state dict, got int"):
        load_parsing(build(), 3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="the encoder's state dict: 1 is no name of a tensor"):
        load_parsing(build(), {1: torch.zeros(1)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"labels must map tasks to names, .*got 3"):
        UperNetForUnifiedPerceptualParsing.from_official(encoder=encoder, decoder=decoder, labels=3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"nowhere\.pth is no file; give the decoder's .pth"):
        load_parsing(build(), decoder=tmp_path / "nowhere.pth")
    with torch.device("meta"):
        empty = build()
    with pytest.raises(ValueError, match=r"the model is on the meta device .*to_empty"):
        load_parsing(empty, encoder)


class Code:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code ran')",))


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"conv1.weight": Code()}, tmp_path / "encoder_epoch_1.pth")
    with pytest.raises(CheckpointError, match=r"encoder_epoch_1\.pth contains code"):
        load_parsing(build(), tmp_path / "encoder_epoch_1.pth")


# Models from a folder -------------------------------------------------------------------------------------------------


def labels_json(other: bool) -> dict[str, Any]:
    """Return the content of a labels.json; objects with parts are not in the order of their numbers."""
    first = ["-"] if other else []
    return {**LABELS, "object_part": {"person": [*first, "arm", "head"], "house": [*first, "roof"]}}


@pytest.mark.parametrize("other", [False, True], ids=["parts", "other-and-parts"])
def test_a_folder_gives_the_whole_configuration(other, tmp_path):
    encoder, decoder = states(temporary=True)
    saved(tmp_path, encoder, decoder)
    (tmp_path / "labels.json").write_text(json.dumps(labels_json(other)))
    model = UperNetForUnifiedPerceptualParsing.from_official(tmp_path)
    assert not model.training
    found = model.config
    assert found.tasks == ("scene", "object", "part", "material")
    assert found.labels == LABELS
    assert found.object_parts == PARTS
    assert (found.hidden_size, found.pool_channels, found.pooling) == (16, 16, "precise_roi")
    assert found.backbone_config.depths == BLOCKS
    assert found.backbone_config.stem_widths == [4, 6, 8]
    expected = build(tasks=found.tasks)
    load_parsing(expected, encoder, decoder)
    assert unchanged(model, values_of(expected))


def test_values_labels_and_files_can_be_given(tmp_path):
    encoder, decoder = states()
    saved(tmp_path, encoder, decoder)
    names = {**labels_json(True), "texture": ["dotted", "striped"]}
    (tmp_path / "names.json").write_text(json.dumps(names))
    model = UperNetForUnifiedPerceptualParsing.from_official(
        encoder=tmp_path / "encoder_epoch_40.pth",
        decoder=decoder,
        labels=tmp_path / "names.json",
        tasks=["object", "texture"],
        pooling="adaptive",
        texture_channels=8,
    )
    assert model.config.tasks == ("object", "texture")
    assert model.config.pooling == "adaptive"
    assert model.config.labels["texture"] == ["dotted", "striped"]
    assert torch.equal(model.decode_head.object_head.classifier.bias, decoder["object_head.1.bias"])


def test_the_official_tables_are_the_default():
    whole = UnifiedPerceptualParsingConfig()
    classes = {task: whole.num_channels_of(task) for task in CHANNELS}
    model = UperNetForUnifiedPerceptualParsing.from_official(
        **dict(zip(("encoder", "decoder"), states(classes=classes), strict=True))
    )
    assert model.config.labels["scene"] == whole.labels["scene"]
    assert model.config.object_parts == whole.object_parts


def test_of_several_epochs_the_highest_is_taken(tmp_path, caplog):
    for epoch in (9, 40, 5):
        encoder, decoder = states()
        decoder["object_head.1.bias"].fill_(epoch)
        saved(tmp_path, encoder, decoder, epoch)
    torch.save(encoder, tmp_path / "encoder_epoch_41.pth")
    with caplog.at_level(logging.WARNING):
        model = UperNetForUnifiedPerceptualParsing.from_official(tmp_path, labels=labels_json(True))
    assert model.decode_head.object_head.classifier.bias[0] == 40
    assert "has 3 epochs; taking the highest, encoder_epoch_40.pth" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"has no encoder_\*.pth"),
        (["encoder_epoch_1.pth"], r"has no decoder_\*.pth"),
        (["encoder_epoch_1.pth", "decoder_epoch_2.pth"], "has no encoder and decoder of one epoch"),
    ],
)
def test_folders_without_a_pair_are_refused(names, message, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        UperNetForUnifiedPerceptualParsing.from_official(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere is no folder"):
        UperNetForUnifiedPerceptualParsing.from_official(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="give a folder with"):
        UperNetForUnifiedPerceptualParsing.from_official(encoder=states()[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"object": ["-", "sky"]}, "labels.json has 2 names of object, .*decoder_epoch_40.pth 4 channels"),
        ({"scene": "field"}, "labels.json: 'scene' must be a list of names"),
        ({"object_part": {"house": ["roof"]}}, "has 1 parts of 1 objects, which need 2 channels .* has 5"),
        ({"object_part": {"person": ["-", "arm", "nose"], "house": ["-", "roof"]}}, "the part 'nose', which is not"),
        ({"object_part": {"cat": ["-", "arm", "head"], "house": ["-", "roof"]}}, "the object 'cat', which is not"),
        ({"part": ["-", "roof", "head", "arm", "arm"]}, "the part 'arm', which is twice or more among its parts"),
        ({"object_part": []}, "'object_part' must map names of objects to lists"),
        ({"part": None}, "'part' must be a list of names"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, message, tmp_path):
    saved(tmp_path, *states())
    (tmp_path / "labels.json").write_text(json.dumps({**labels_json(True), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        UperNetForUnifiedPerceptualParsing.from_official(tmp_path)
    assert str(tmp_path / "labels.json") in str(caught.value)


def test_decoders_without_heads_or_convolutions_are_refused():
    encoder, decoder = states()
    pyramid = {name: x for name, x in decoder.items() if "_head." not in name}
    with pytest.raises(CheckpointError, match="the decoder's state dict has no head of any task"):
        UperNetForUnifiedPerceptualParsing.from_official(encoder=encoder, decoder=pyramid)
    del encoder["conv2.weight"]
    with pytest.raises(CheckpointError, match=r"the encoder's state dict has no convolution conv2\.weight"):
        UperNetForUnifiedPerceptualParsing.from_official(encoder=encoder, decoder=decoder)
