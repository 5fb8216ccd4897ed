"""Unified Perceptual Parsing against the official code stated again, in float64: logits, losses, gradients, maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastuper import (
    DeepStemResNetConfig,
    UnifiedPerceptualParsingConfig,
    UperNetForUnifiedPerceptualParsing,
    UperNetImageProcessor,
)
from fastuper.data.parsing_labels import default_labels, default_object_parts
from fastuper.models.heads.parsing import ParsingHead
from fastuper.weights.official import load_parsing
from tests.parity import parsing_reference as reference

COUNTS = {"scene": 5, "object": 8, "part": 9, "material": 4, "texture": 6}
OBJECT_PARTS = {2: (1, 3), 3: (5,), 6: (2, 4, 7, 8)}  # objects 1, 4, 5 and 7 have no parts, part 6 has no object
CHANNELS = (8, 12, 16, 20)
STEM = (4, 6, 10)
BLOCKS = (2, 1, 1, 1)
WEIGHTS = {**reference.LOSS_WEIGHTS, "texture": 1.0}
POOLINGS = [("precise_roi", True), ("precise_roi", False), ("adaptive", True), ("adaptive", False)]


def model_and_states(
    pooling: str = "precise_roi", resample_first: bool = True, pool_channels: int = 10, shipped: bool = False
) -> tuple[UperNetForUnifiedPerceptualParsing, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return a model in float64, and the official encoder, the official decoder and the texture head in it.

    Args:
        pooling: as in the configuration.
        resample_first: as in the configuration.
        pool_channels: as in the configuration; `hidden_size` is 16.
        shipped: the model has the classes that the package ships.
    """
    labels = {task: [f"{task} {index}" for index in range(count)] for task, count in COUNTS.items()}
    object_parts = OBJECT_PARTS
    if shipped:
        labels, object_parts = default_labels(), default_object_parts()
    config = UnifiedPerceptualParsingConfig(
        backbone_config=DeepStemResNetConfig(
            stem_widths=STEM,
            hidden_sizes=CHANNELS,
            depths=BLOCKS,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        hidden_size=16,
        pool_channels=pool_channels,
        pooling=pooling,
        resample_first=resample_first,
        labels=labels,
        object_parts=object_parts,
        texture_channels=7,
    )
    generator = torch.Generator().manual_seed(0)
    counts = {task: len(names) for task, names in labels.items()}
    counts["part"] = sum(1 + len(parts) for parts in object_parts.values())
    textures = counts.pop("texture")
    encoder, decoder = reference.official_state(
        generator,
        hidden_size=16,
        pool_channels=pool_channels,
        channels=CHANNELS,
        classes=counts,
        blocks=BLOCKS,
        stem_widths=STEM,
        temporary=True,
    )
    texture = reference.texture_state(generator, channels=CHANNELS[0], texture_channels=7, classes=textures)
    model = UperNetForUnifiedPerceptualParsing(config).double().eval()
    load_parsing(model, encoder, decoder)
    model.decode_head.texture_head.load_state_dict(texture, strict=False)  # without BatchNorm's count of batches
    return model, encoder, decoder, texture


def assert_close(found: Tensor, expected: Tensor, name: Any = "") -> None:
    assert found.shape == expected.shape, name
    assert found.dtype == expected.dtype == torch.float64, name
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max(), name


def random_labels(
    size: tuple[int, int],
    *,
    texture_map: bool = False,
    counts: Mapping[str, int] = COUNTS,
    object_parts: reference.ObjectParts = OBJECT_PARTS,
) -> dict[str, Tensor]:
    """Return labels of two images. In the second image, no part of object 2 is labelled and the scene is not."""
    shape = (2, *size)
    objects, parts = torch.randint(counts["object"], shape), torch.zeros(shape, dtype=torch.int64)
    for number, own in object_parts.items():
        inside = objects == number
        parts[inside] = torch.tensor([0, *own])[torch.randint(1 + len(own), (int(inside.sum()),))]
    parts[1][objects[1] == 2] = 0
    return {
        "scene": torch.tensor([3, -1]),
        "object": objects,
        "part": parts,
        "material": torch.randint(counts["material"], shape),
        "texture": torch.randint(-1, counts["texture"], shape) if texture_map else torch.tensor([4, -1]),
    }


@pytest.mark.parametrize(("pooling", "resample_first"), POOLINGS)
@pytest.mark.parametrize("pool_channels", [10, 16])
def test_logits_of_all_heads_from_feature_maps(pooling: str, resample_first: bool, pool_channels: int) -> None:
    model, _, decoder, texture = model_and_states(pooling, resample_first, pool_channels)
    for size in [(1, 1), (2, 3), (7, 4), (8, 8), (15, 22), (33, 18)]:
        sizes = [size]
        for _ in CHANNELS[1:]:
            sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
        maps = [torch.randn(2, width, *own, dtype=torch.float64) for width, own in zip(CHANNELS, sizes, strict=True)]
        with torch.no_grad():
            found = model.decode_head(maps)
        expected = reference.reference_decoder(
            decoder, maps, pooling=pooling, resample_first=resample_first, texture=texture
        )
        assert list(found) == ["scene", "object", "part", "material", "texture"]
        for task, logits in expected.items():
            assert_close(found[task], logits, (task, size))


@pytest.mark.parametrize("size", [(32, 32), (65, 83), (1, 1)])
def test_logits_from_pixels(size: tuple[int, int]) -> None:
    model, encoder, decoder, texture = model_and_states()
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        found = model(pixels)
    maps = reference.reference_encoder(encoder, pixels)
    for task, logits in reference.reference_decoder(decoder, maps, texture=texture).items():
        assert_close(found[task], logits, task)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("pooling", "resample_first"), POOLINGS)
def test_losses_and_gradients(pooling: str, resample_first: bool, training: bool) -> None:
    """Labels at the size of the logits (the official loss) without BatchNorm's statistics; else at the photo's."""
    model, *states = model_and_states(pooling, resample_first)
    tensors = [tensor for state in states for name, tensor in state.items() if name.endswith((".weight", ".bias"))]
    for tensor in tensors:
        tensor.requires_grad_()
    encoder, decoder, texture = states
    pixels = torch.randn(2, 3, 50, 71, dtype=torch.float64, requires_grad=True)
    labels = random_labels((50, 71) if training else (13, 18), texture_map=training)

    output = model.train(training)(pixels, labels=labels)
    # The names differ: each parameter is found by its values, which are random.
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    output.loss.backward()
    gradient, pixels.grad = pixels.grad, None

    maps = reference.reference_encoder(encoder, pixels, training=training)
    logits = reference.reference_decoder(
        decoder, maps, pooling=pooling, resample_first=resample_first, texture=texture, training=training
    )
    loss, terms = reference.reference_loss(logits, labels, OBJECT_PARTS, WEIGHTS)
    loss.backward()
    assert all(term > 0 for term in terms.values())
    for task, term in terms.items():
        assert_close(output[f"{task}_loss"], term, task)
    assert_close(output.loss, loss)
    assert_close(gradient, pixels.grad)
    compared = 0
    for name, parameter in model.named_parameters():
        (official,) = (
            tensor for tensor in tensors if tensor.shape == parameter.shape and torch.equal(tensor, values[name])
        )
        assert_close(parameter.grad, official.grad, name)
        compared += 1
    assert compared == sum(tensor.grad is not None for tensor in tensors)


def test_textures_do_not_train_the_backbone() -> None:
    model, *_ = model_and_states()
    pixels = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    model(pixels, labels={"texture": torch.tensor([1, 2])}).loss.backward()
    trained = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("decode_head.texture_head.")}


UNLABELLED = {
    "scene": torch.tensor([-1, -1]),
    "object": torch.zeros(2, 10, 12, dtype=torch.int64),
    "part": torch.zeros(2, 10, 12, dtype=torch.int64),
    "material": torch.zeros(2, 10, 12, dtype=torch.int64),
    "texture": torch.tensor([-1, -1]),
}


@pytest.mark.parametrize(
    "empty", [("scene",), ("object", "part"), ("part",), ("material",), ("texture",), tuple(UNLABELLED)]
)
def test_empty_targets_give_zero(empty: tuple[str, ...]) -> None:
    model, encoder, decoder, texture = model_and_states()
    pixels = torch.randn(2, 3, 40, 46, dtype=torch.float64)
    labels = {**random_labels((10, 12)), **{task: UNLABELLED[task] for task in empty}}
    output = model(pixels, labels=labels)
    output.loss.backward()
    logits = reference.reference_decoder(decoder, reference.reference_encoder(encoder, pixels), texture=texture)
    loss, _ = reference.reference_loss(logits, labels, OBJECT_PARTS, WEIGHTS)
    assert_close(output.loss, loss)
    for task in COUNTS:
        assert (output[f"{task}_loss"] == 0) == (task in empty), task
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    if empty == tuple(UNLABELLED):
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def with_many_classes(
    model: UperNetForUnifiedPerceptualParsing, encoder: dict[str, Tensor], decoder: dict[str, Tensor], pixels: Tensor
) -> None:
    """Take the mean of each class's logits from its bias, in the model too, so that many classes win somewhere."""
    logits = reference.reference_decoder(decoder, reference.reference_encoder(encoder, pixels))
    for task in ("object", "part", "material"):
        decoder[f"{task}_head.1.bias"] -= logits[task].mean((0, 2, 3))
        decoder[f"{task}_head.1.bias"][0] += 1  # class 0 wins somewhere
    load_parsing(model, encoder, decoder)


@pytest.mark.parametrize("mask_background", [False, True])
@pytest.mark.parametrize("sides", [[(61, 45)], [(40, 32), (61, 45), (90, 70)]])
def test_label_maps(sides: list[tuple[int, int]], mask_background: bool) -> None:
    """One scale, and the mean of three, against full-size probabilities."""
    model, encoder, decoder, texture = model_and_states()
    pixels = [torch.randn(2, 3, *size, dtype=torch.float64) for size in sides]
    sizes = [(75, 58), (33, 20)]
    with_many_classes(model, encoder, decoder, pixels[0])
    maps = [reference.reference_encoder(encoder, x) for x in pixels]
    logits = [reference.reference_decoder(decoder, x, texture=texture) for x in maps]
    expected = reference.reference_labels(logits, sizes, OBJECT_PARTS, mask_background=mask_background)
    found = model.parse(pixels if len(pixels) > 1 else pixels[0], sizes, mask_background=mask_background, top=3)
    occurring = {task: set() for task in ("object", "part", "material", "texture")}
    for ours, theirs in zip(found, expected, strict=True):
        names = {"objects": "object", "parts": "part", "materials": "material", "textures": "texture"}
        for name, task in names.items():
            assert torch.equal(getattr(ours, name), theirs[task]), task
            occurring[task] |= set(theirs[task].unique().tolist())
        probabilities, numbers = theirs["scene"].topk(3)
        assert [number for number, _ in ours.scene] == numbers.tolist()
        assert_close(torch.tensor([share for _, share in ours.scene], dtype=torch.float64), probabilities)
    assert all(len(numbers) > 2 for numbers in occurring.values()), occurring
    assert (0 in occurring["object"]) != mask_background
    assert (0 in occurring["material"]) != mask_background


def test_shipped_tables() -> None:
    """336 objects, of which 77 have parts: the sum of their losses, its gradient, and the label maps."""
    model, encoder, decoder, texture = model_and_states(shipped=True)
    counts = {task: len(names) for task, names in default_labels().items()}
    object_parts = default_object_parts()
    pixels = torch.randn(2, 3, 96, 128, dtype=torch.float64, requires_grad=True)
    labels = random_labels((24, 32), counts=counts, object_parts=object_parts)
    output = model(pixels, labels=labels)
    logits = reference.reference_decoder(decoder, reference.reference_encoder(encoder, pixels), texture=texture)
    loss, terms = reference.reference_loss(logits, labels, object_parts, WEIGHTS)
    for task, term in terms.items():
        assert_close(output[f"{task}_loss"], term, task)
    (found,), (expected,) = torch.autograd.grad(output.loss, pixels), torch.autograd.grad(loss, pixels)
    assert_close(found, expected)

    with_many_classes(model, encoder, decoder, pixels.detach())
    logits = reference.reference_decoder(
        decoder, reference.reference_encoder(encoder, pixels.detach()), texture=texture
    )
    sizes = [(96, 128), (50, 60)]
    for ours, theirs in zip(
        model.parse(pixels.detach(), sizes), reference.reference_labels([logits], sizes, object_parts), strict=True
    ):
        assert torch.equal(ours.objects, theirs["object"])
        assert torch.equal(ours.parts, theirs["part"])
        assert len(ours.objects.unique()) > 30
        assert len(ours.parts.unique()) > 10


def test_a_photo_at_several_sizes() -> None:
    """The official demo: a photo is prepared at several sizes, and their probabilities are averaged."""
    model, encoder, decoder, texture = model_and_states()
    photo = np.random.default_rng(0).integers(0, 256, (60, 83, 3), dtype=np.uint8)
    shorts = (30, 45, 70)
    pixels = []
    for short in shorts:
        processor = UperNetImageProcessor.for_parsing(size={"shortest_edge": short, "longest_edge": 90})
        pixels.append(processor(images=photo, return_tensors="pt").pixel_values.double())
    prepared = [torch.from_numpy(reference.reference_input(photo, short, 90)).double()[None] for short in shorts]
    assert [tuple(x.shape[2:]) for x in prepared] == [(32, 48), (48, 64), (72, 96)]
    with_many_classes(model, encoder, decoder, prepared[0])
    maps = [reference.reference_encoder(encoder, x) for x in prepared]
    logits = [reference.reference_decoder(decoder, x, texture=texture) for x in maps]
    size = (photo.shape[0], photo.shape[1])
    (expected,) = reference.reference_labels(logits, [size], OBJECT_PARTS)
    (found,) = model.parse(pixels, [size])
    assert torch.equal(found.objects, expected["object"])
    assert torch.equal(found.parts, expected["part"])
    assert torch.equal(found.materials, expected["material"])
    assert torch.equal(found.textures, expected["texture"])
    assert found.scene[0][0] == int(expected["scene"].argmax())


@pytest.mark.parametrize(("hidden_size", "parameters"), [(512, 50_546_818), (256, 20_885_122)])
def test_the_official_decoders_have_as_many_parameters(hidden_size: int, parameters: int) -> None:
    """The decoders `upernet` and `upernet_lite`; textures are not in them."""
    config = UnifiedPerceptualParsingConfig(hidden_size=hidden_size, tasks=("scene", "object", "part", "material"))
    with torch.device("meta"):
        head = ParsingHead(config, [256, 512, 1024, 2048])
    assert sum(parameter.numel() for parameter in head.parameters()) == parameters


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


@pytest.mark.exhaustive
def test_the_official_network_at_full_width() -> None:
    """ResNet-50 and 512 channels: logits in float64; in float32 their errors beside the textbook's, and label maps."""
    labels, object_parts = default_labels(), default_object_parts()
    counts = {task: len(names) for task, names in labels.items() if task != "texture"}
    counts["part"] = sum(1 + len(parts) for parts in object_parts.values())
    encoder, decoder = reference.official_state(
        torch.Generator().manual_seed(0),
        hidden_size=512,
        pool_channels=512,
        channels=(256, 512, 1024, 2048),
        classes=counts,
        blocks=(3, 4, 6, 3),
        stem_widths=(64, 64, 128),
    )
    model = UperNetForUnifiedPerceptualParsing.from_official(encoder=encoder, decoder=decoder)
    assert model.dtype == torch.float32
    pixels = torch.randn(1, 3, 137, 190, dtype=torch.float64)
    with torch.no_grad():
        logits = reference.reference_decoder(decoder, reference.reference_encoder(encoder, pixels))
        (expected,) = reference.reference_labels([logits], [(137, 190)], object_parts)
        fast, (parsing,) = model(pixels.float()), model.parse(pixels.float())
        # The less exact of PyTorch's two memory layouts, as in the rule of accuracy.
        single = [
            {name: channels_last(tensor.float()) for name, tensor in state.items()} for state in (encoder, decoder)
        ]
        maps = reference.reference_encoder(single[0], channels_last(pixels.float()))
        textbook = reference.reference_decoder(single[1], maps)
        exact = model.double()
        load_parsing(exact, encoder, decoder)
        found = exact(pixels)
    for task, values in logits.items():
        assert_close(found[task], values, task)
        ours, theirs = ((x[task].double() - values).square().mean().sqrt() for x in (fast, textbook))
        assert ours <= 1.25 * theirs, (task, ours / theirs)
    assert (parsing.objects == expected["object"]).double().mean() > 0.999
    assert (parsing.parts == expected["part"]).double().mean() > 0.999
    assert (parsing.materials == expected["material"]).double().mean() > 0.999
