"""`UperNetImageProcessor` alone: its results, inputs that Transformers' class refuses, and its errors."""

import copy
import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from fastuper.data.bilinear import interpolate
from fastuper.data.processor import BatchFeature, UperNetImageProcessor

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def smooth(height, width):
    """Return an image of smooth colours: errors of resizing are small, errors of position large."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // max(height - 1, 1), x * 255 // max(width - 1, 1), (x + y) % 256], -1).astype(np.uint8)


def only(batch):
    (values,) = batch["pixel_values"]
    return values


def test_the_formula():
    """Against float64: two roundings to float32 and a division away."""
    image = noise(45, 71, 3)
    values = only(UperNetImageProcessor(do_resize=False)(image))
    expected = np.moveaxis((image / 255.0 - MEAN) / STD, -1, 0)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, rtol=0, atol=5e-7)


def test_resizing_is_pillows():
    image = Image.fromarray(noise(300, 451, 3))
    for resample in Image.Resampling:
        processor = UperNetImageProcessor(size=(97, 201), resample=resample, do_rescale=False, do_normalize=False)
        expected = np.moveaxis(np.asarray(image.resize((201, 97), resample)), -1, 0)
        np.testing.assert_array_equal(only(processor(image)), expected, strict=True)


def test_steps_are_in_order():
    """Rescaling before normalizing, resizing before both."""
    image = noise(20, 30, 3)
    resized = np.asarray(Image.fromarray(image).resize((9, 8), Image.Resampling.BILINEAR))
    processor = UperNetImageProcessor(size=(8, 9), rescale_factor=0.5, image_mean=[1, 2, 3], image_std=[4, 5, 6])
    expected = np.moveaxis((resized * 0.5 - [1, 2, 3]) / [4, 5, 6], -1, 0)
    np.testing.assert_allclose(only(processor(image)), expected, rtol=1e-6)


@pytest.mark.parametrize("height", [1, 63, 64, 65, 200])
def test_lookup_by_rows_covers_every_row(height):
    image = noise(height, 3, 3)
    values = only(UperNetImageProcessor(do_resize=False)(image))
    whole = only(UperNetImageProcessor(do_resize=False)(image.astype(np.int64)))  # computed, not looked up
    np.testing.assert_array_equal(values, whole, strict=True)


def test_layouts_are_told_apart():
    image = smooth(40, 60)
    expected = only(UperNetImageProcessor()(image))
    for other in (
        np.moveaxis(image, -1, 0),
        torch.from_numpy(image),
        torch.from_numpy(image).permute(2, 0, 1),
        Image.fromarray(image),
    ):
        np.testing.assert_array_equal(only(UperNetImageProcessor()(other)), expected, strict=True)


def test_the_length_of_the_mean_decides_between_dimensions():
    """Transformers takes the 4 for the channels and then fails, since the mean has 3."""
    image = noise(4, 50, 3)
    expected = only(UperNetImageProcessor()(Image.fromarray(image)))
    np.testing.assert_array_equal(only(UperNetImageProcessor()(image)), expected, strict=True)
    five = {"image_mean": [0.5] * 5, "image_std": [0.2] * 5, "do_resize": False}
    assert only(UperNetImageProcessor(**five)(noise(7, 8, 5))).shape == (5, 7, 8)


def test_ambiguous_layout_warns():
    image = noise(3, 50, 3)
    with pytest.warns(UserWarning, match="input_data_format"):
        first = only(UperNetImageProcessor(do_resize=False)(image))
    np.testing.assert_array_equal(
        first, only(UperNetImageProcessor(do_resize=False)(image, input_data_format="channels_first"))
    )
    last = only(UperNetImageProcessor(do_resize=False)(image, input_data_format="channels_last"))
    np.testing.assert_array_equal(last, only(UperNetImageProcessor(do_resize=False)(Image.fromarray(image))))


def test_channels_last_results():
    images = [smooth(40, 60), noise(40, 60, 3)]
    processor = UperNetImageProcessor(size=32)
    first = processor(images, return_tensors="np")["pixel_values"]
    last = processor(images, return_tensors="np", data_format="channels_last")["pixel_values"]
    np.testing.assert_array_equal(last, first.transpose(0, 2, 3, 1), strict=True)
    assert last.flags.c_contiguous


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16, torch.float32])
def test_tensors(dtype):
    tensor = torch.arange(3 * 16 * 16).reshape(3, 16, 16).remainder(256).to(dtype)
    if dtype.is_floating_point:
        tensor.requires_grad_()
    expected = only(UperNetImageProcessor(size=11)(tensor.detach().to(torch.int64).numpy()))
    np.testing.assert_array_equal(only(UperNetImageProcessor(size=11)(tensor)), expected, strict=True)


def test_thirteen_channels_are_resized_one_by_one():
    image = noise(13, 30, 40)
    options = {"do_rescale": False, "do_normalize": False, "size": (17, 23)}
    processor = UperNetImageProcessor(image_mean=[0.1] * 13, image_std=[0.2] * 13, **options)
    values = only(processor(image))
    for plane, value in zip(image, values, strict=True):
        np.testing.assert_array_equal(value, np.asarray(Image.fromarray(plane).resize((23, 17), 2)), strict=True)


# Modes of PIL images. Expected is the same picture in RGB.


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "HSV", "YCbCr", "RGBX"])
def test_modes_become_rgb(mode):
    image = Image.fromarray(smooth(40, 60)).convert(mode)
    values = only(UperNetImageProcessor(size=30)(image))
    expected = only(UperNetImageProcessor(size=30)(image.convert("RGB")))
    np.testing.assert_array_equal(values, expected, strict=True)


def test_palette_gives_colours_not_indices():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    values = only(UperNetImageProcessor(do_normalize=False, do_rescale=False)(image))
    np.testing.assert_array_equal(values, np.full((3, 512, 512), 1, np.uint8) * np.uint8([[[200]], [[100]], [[50]]]))


def test_transparent_palette_does_not_warn():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info["transparency"] = b"\x00\x7f"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = only(UperNetImageProcessor(do_normalize=False, do_rescale=False, size=8)(image))
    np.testing.assert_array_equal(values[:, 0, 0], [200, 100, 50])


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_sixteen_bit_grey_is_scaled(byte_order):
    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    image = Image.frombytes("I;16" if byte_order == "<u2" else "I;16B", (64, 64), levels.astype(byte_order).tobytes())
    values = only(UperNetImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)(image))
    np.testing.assert_array_equal(values, np.stack([np.round(levels / 257).astype(np.uint8)] * 3), strict=True)


@pytest.mark.parametrize("mode", ["I", "F"])
@pytest.mark.parametrize("statistics", [[0.5], 0.5], ids=["one", "any"])
def test_32_bit_images_are_numbers_of_one_channel(mode, statistics):
    levels = noise(40, 60)
    processor = UperNetImageProcessor(image_mean=statistics, image_std=statistics, size=30)
    expected = only(processor(levels[None], input_data_format="channels_first"))
    np.testing.assert_array_equal(only(processor(Image.fromarray(levels).convert(mode))), expected, strict=True)
    as_they_are = UperNetImageProcessor(do_resize=False, image_mean=statistics, image_std=statistics)
    numbers = levels.astype(np.int32) * 1000 - 7
    image = Image.fromarray(numbers).convert(mode)
    np.testing.assert_array_equal(only(as_they_are(image)), only(as_they_are(np.asarray(image)[None])), strict=True)


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "P", "1"])
def test_one_channel(mode):
    image = Image.fromarray(smooth(40, 60)).convert(mode)
    processor = UperNetImageProcessor(image_mean=[0.5], image_std=[0.25], do_resize=False)
    expected = (np.asarray(image.convert("L"))[None] / 255 - 0.5) / 0.25
    np.testing.assert_allclose(only(processor(image)), expected, atol=1e-6)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 1), ("1", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)])
def test_single_statistics_leave_grey_images_grey(mode, channels):
    image = Image.fromarray(smooth(40, 60)).convert(mode)
    values = only(UperNetImageProcessor(image_mean=0.5, image_std=0.25, do_resize=False)(image))
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(40, 60, channels)
    np.testing.assert_allclose(values, np.moveaxis((pixels / 255 - 0.5) / 0.25, -1, 0), atol=1e-6)


def test_files(tmp_path):
    image = Image.fromarray(smooth(40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera turned by 90 degrees
    image.save(tmp_path / "image.png", exif=exif)
    labels = Image.fromarray(noise(60, 40))
    labels.save(tmp_path / "labels.png")
    processor = UperNetImageProcessor(size=(31, 37))
    expected = processor(image.transpose(Image.Transpose.ROTATE_270), labels)
    for path in (tmp_path / "image.png", str(tmp_path / "image.png")):
        batch = processor(path, tmp_path / "labels.png")
        np.testing.assert_array_equal(only(batch), only(expected), strict=True)
        np.testing.assert_array_equal(batch["labels"][0], expected["labels"][0], strict=True)


# Segmentation maps


def test_labels_beyond_eight_bits_survive_resizing():
    """The nearest pixels do not depend on the labels: each label here is its own position."""
    labels = np.arange(60 * 40).reshape(60, 40) - 7
    batch = UperNetImageProcessor(size=(33, 57))(noise(60, 40, 3), labels)
    rows = np.asarray(Image.fromarray(np.arange(60, dtype=np.uint8)[:, None].repeat(40, 1)).resize((57, 33), 0))
    columns = np.asarray(Image.fromarray(np.arange(40, dtype=np.uint8)[None].repeat(60, 0)).resize((57, 33), 0))
    np.testing.assert_array_equal(batch["labels"][0], rows.astype(np.int64) * 40 + columns - 7, strict=True)


@pytest.mark.parametrize("do_resize", [True, False])
def test_reduced_labels(do_resize):
    labels = np.array([[0, 1, 2], [150, 254, 255]], np.uint8)
    before = labels.copy()
    processor = UperNetImageProcessor(do_reduce_labels=True, do_resize=do_resize, size=(2, 3))
    batch = processor(noise(2, 3, 3), labels)
    np.testing.assert_array_equal(batch["labels"][0], np.array([[255, 0, 1], [149, 253, 255]]), strict=True)
    np.testing.assert_array_equal(labels, before, strict=True)


@pytest.mark.parametrize("kind", ["bool", "1", "float"])
def test_other_kinds_of_maps(kind):
    labels = noise(5, 7) > 127
    maps = {"bool": labels, "1": Image.fromarray(labels), "float": labels.astype(np.float32)}[kind]
    batch = UperNetImageProcessor(size=(5, 7))(noise(5, 7, 3), maps)
    np.testing.assert_array_equal(batch["labels"][0], labels.astype(np.int64), strict=True)


# Results share no memory with inputs, and inputs keep their values


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("steps", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_inputs_are_neither_changed_nor_shared(dtype, steps, return_tensors):
    image, labels = noise(3, 9, 11).astype(dtype), noise(9, 11).astype(np.int64)
    kept = image.copy(), labels.copy()
    processor = UperNetImageProcessor(do_resize=False, do_rescale=steps[0], do_normalize=steps[1])
    batch = processor(image, labels, return_tensors=return_tensors)
    for values in batch.values():
        for value in values:
            value[...] = 99
    np.testing.assert_array_equal(image, kept[0], strict=True)
    np.testing.assert_array_equal(labels, kept[1], strict=True)


def test_returned_types():
    images = [noise(8, 9, 3), noise(8, 9, 3, seed=1)]
    labels = [noise(8, 9), noise(8, 9, seed=1)]
    processor = UperNetImageProcessor(size=(5, 6))
    lists = processor(images, labels)
    arrays = processor(images, labels, return_tensors="np")
    tensors = processor(images, labels, return_tensors="pt")
    assert [type(lists[key]) for key in lists] == [list, list]
    for key, dtype in (("pixel_values", torch.float32), ("labels", torch.int64)):
        np.testing.assert_array_equal(np.stack(lists[key]), arrays[key], strict=True)
        np.testing.assert_array_equal(tensors[key].numpy(), arrays[key], strict=True)
        assert tensors[key].dtype == dtype
        assert tensors[key].is_contiguous()
    assert "labels" not in processor(images)


# The dictionary of results


def test_batch_feature_is_a_mapping_with_attributes():
    batch = BatchFeature({"pixel_values": torch.ones(2), "labels": torch.zeros(2, dtype=torch.int64)})
    batch["target_size"] = [(4, 5)]
    assert batch.target_size == [(4, 5)]
    assert (lambda **keywords: sorted(keywords))(**batch) == ["labels", "pixel_values", "target_size"]
    assert batch.pop("target_size") == [(4, 5)]
    assert not hasattr(batch, "target_size")
    with pytest.raises(AttributeError, match="no 'pixels' here; there are \\['labels', 'pixel_values'\\]"):
        _ = batch.pixels
    for other in (pickle.loads(pickle.dumps(batch)), copy.copy(batch), copy.deepcopy(batch)):
        assert type(other) is BatchFeature
        assert torch.equal(other.labels, batch.labels)


def test_batch_feature_to():
    batch = BatchFeature({"pixel_values": torch.ones(2), "labels": torch.zeros(2, dtype=torch.int64), "size": [(1, 2)]})
    assert batch.to(torch.bfloat16) is batch
    assert batch.pixel_values.dtype == torch.bfloat16
    assert batch.labels.dtype == torch.int64
    batch.to("cpu", torch.float16).to(device="cpu", non_blocking=True)
    assert batch.pixel_values.dtype == torch.float16
    assert batch.to("meta").labels.device.type == "meta"
    assert batch.pixel_values.device.type == "meta"
    assert batch.size == [(1, 2)]
    with pytest.raises(TypeError, match="a device or a dtype, not float"):
        batch.to(1.5)


# Configuration files


HUB_FILES = {
    "new": {
        "do_normalize": True,
        "do_reduce_labels": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "SegformerImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 512, "width": 512},
    },
    "old": {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "SegformerFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "reduce_labels": True,
        "resample": 2,
        "size": 512,
    },
}


@pytest.mark.parametrize("file", HUB_FILES)
def test_files_of_the_hub(file, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HUB_FILES[file]))
    processor = UperNetImageProcessor.from_pretrained(tmp_path)
    assert json.loads(processor.to_json_string()) == HUB_FILES["new"]
    (path,) = processor.save_pretrained(tmp_path / "new" / "folder")
    assert json.loads(Path(path).read_text()) == HUB_FILES["new"]
    assert [entry.name for entry in (tmp_path / "new" / "folder").iterdir()] == ["preprocessor_config.json"]


def test_what_a_file_says_is_kept_or_overridden(tmp_path):
    config = {**HUB_FILES["new"], "do_reduce_labels": False, "reduce_labels": True, "crop_size": [1, 2], "note": None}
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    processor = UperNetImageProcessor.from_pretrained(tmp_path, subfolder="sub", size=640, do_resize=False)
    assert processor.size == {"height": 640, "width": 640}
    assert not processor.do_resize
    assert not processor.do_reduce_labels, "the new name wins over the old one"
    assert processor.extra == {"crop_size": [1, 2], "note": None}
    processor.save_pretrained(tmp_path)
    again = UperNetImageProcessor.from_pretrained(tmp_path / "preprocessor_config.json", do_reduce_labels=True)
    assert again.to_dict() == {**processor.to_dict(), "do_reduce_labels": True}
    assert "crop_size" in repr(again)


def test_constructor_takes_the_forms_of_each_option():
    assert UperNetImageProcessor(size=384).size == {"height": 384, "width": 384}
    assert UperNetImageProcessor(size=(384, 640)).size == {"height": 384, "width": 640}
    assert UperNetImageProcessor(size={"width": 640, "height": 384}).size == {"height": 384, "width": 640}
    assert UperNetImageProcessor(image_mean=np.float32([0.5, 0.25, 0])).image_mean == (0.5, 0.25, 0.0)
    assert UperNetImageProcessor(image_mean=1).image_mean == 1.0
    assert UperNetImageProcessor(reduce_labels=True).do_reduce_labels
    assert UperNetImageProcessor(resample=Image.Resampling.LANCZOS).resample == 1


def test_attributes_may_be_changed():
    processor = UperNetImageProcessor()
    processor.size = {"height": 20, "width": 30}
    assert only(processor(noise(8, 9, 3))).shape == (3, 20, 30)
    processor.size["height"] = 0
    with pytest.raises(ValueError, match="each at least 1"):
        processor(noise(8, 9, 3))


def test_post_processing():
    """Two classes, the left and the right half of the image; the expected labels are written by hand."""
    logits = torch.zeros(2, 3, 4, 4)
    logits[0, 1, :, :2] = 1
    logits[0, 2, :, 2:] = 1
    logits[1, 2] = 1
    processor = UperNetImageProcessor()
    first, second = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), [(8, 16), (3, 5)])
    assert torch.equal(first, torch.tensor([1] * 8 + [2] * 8).expand(8, 16))
    assert torch.equal(second, torch.full((3, 5), 2))
    own = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits))
    assert torch.equal(torch.stack(own), torch.stack([torch.tensor([1, 1, 2, 2]).expand(4, 4), torch.full((4, 4), 2)]))
    with pytest.raises(ValueError, match="1 target_sizes for 2 images"):
        processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), [(8, 8)])
    for wrong in ([(8.5, 8), (8, 8)], [(8, 8), (0, 8)], [8, 8]):
        with pytest.raises(ValueError, match="sizes must be"):
            processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), wrong)


# Bad input: an error of one line that names the input and the remedy


IMAGE = noise(8, 9, 3)
NAN = IMAGE.astype(np.float32)
NAN[3, 4, 1] = np.nan
INFINITE = torch.from_numpy(IMAGE).float()
INFINITE[3, 4, 1] = -torch.inf
PIL_IMAGE = Image.fromarray(IMAGE)
REFUSED = {
    "nan": ([IMAGE.astype(float), NAN], {}, ValueError, r"images\[1\] holds NaN or infinite.*nan_to_num"),
    "inf": (INFINITE, {}, ValueError, r"images\[0\] holds NaN or infinite"),
    "empty_pil": (Image.new("RGB", (0, 5)), {}, ValueError, r"images\[0\] is 5 x 0.*no pixels"),
    "empty_array": (np.zeros((0, 5, 3), np.uint8), {}, ValueError, r"shape \(0, 5, 3\): it has no pixels"),
    "no_images": ([], {}, ValueError, "images is empty"),
    "none": (None, {}, TypeError, "images holds NoneType; give PIL images"),
    "numbers": ([[1, 2], [3, 4]], {}, TypeError, "images holds int; give PIL images"),
    "mixed": ([PIL_IMAGE, IMAGE], {}, TypeError, "images mixes PIL images or files and numpy arrays"),
    "missing_file": ("no_such_file.png", {}, FileNotFoundError, "no_such_file.png"),
    "text_array": (np.full((8, 9, 3), "a"), {}, TypeError, "dtype <U1; give integers or floats"),
    "complex": (torch.zeros(3, 4, 5, dtype=torch.complex64), {}, TypeError, "dtype complex64"),
    "grey_array": (IMAGE[..., 0], {}, ValueError, r"shape \(8, 9\) where 3 dimensions.*PIL\.Image\.fromarray"),
    "five_dimensions": (np.zeros((1, 1, 3, 4, 5)), {}, ValueError, "where 3 dimensions are expected"),
    "grey_channel": (IMAGE[..., :1], {}, ValueError, "3 channels of image_mean; repeat a grey image"),
    "alpha_channel": (noise(8, 9, 4), {}, ValueError, "3 channels of image_mean.*drop alpha"),
    "wrong_layout": (IMAGE, {"input_data_format": "channels_first"}, ValueError, "has 8 channels.*image_mean is for 3"),
    "pil_bands": (
        PIL_IMAGE,
        {"image_mean": [0.5] * 4, "image_std": [0.5] * 4},
        ValueError,
        "mode RGB with 3 channels, image_mean is for 4",
    ),
    "unknown_channels": (noise(8, 9, 7), {"do_normalize": False}, ValueError, "1, 3 or 4 channels.*input_data_format"),
    "mode_I": (Image.new("I", (5, 4)), {}, ValueError, "mode I, in which no value stands for white"),
    "mode_F": (Image.new("F", (5, 4)), {}, ValueError, "mode F, in which no value stands for white"),
    "above_255": (
        IMAGE.astype(np.int32) * 16,
        {},
        ValueError,
        r"values from \d+ to \d+; Pillow resizes.*do_resize=False",
    ),
    "fractions": (IMAGE + 0.5, {}, ValueError, "values from .*; Pillow resizes whole levels from 0 to 255"),
    "unknown": (IMAGE, {"do_resise": True}, TypeError, "unknown argument do_resise; there are do_resize, size"),
    "long_edge": (IMAGE, {"size": {"longest_edge": 5}}, ValueError, r"images\[0\]: .* cannot be resized .*\"height\""),
    "pixels": (IMAGE, {"size": {"min_pixels": 5, "max_pixels": 9}}, ValueError, "cannot be resized to the size"),
    "forms": (IMAGE, {"size": {"height": 5, "shortest_edge": 9}}, ValueError, "size is .*shortest_edge.*; give"),
    "no_rows": (noise(1, 90, 3), {"size": {"max_height": 9, "max_width": 9}}, ValueError, "would have no pixels"),
    "crop": (
        IMAGE,
        {"do_center_crop": True},
        TypeError,
        "do_center_crop=True: images are not cropped",
    ),
    "pad": (IMAGE, {"pad_size": {"height": 5}}, TypeError, "does not support pad_size=.*: images are not padded"),
    "extra_edge": (IMAGE, {"size": {"height": 5, "width": 5, "depth": 5}}, ValueError, "depth.*; give"),
    "zero_size": (IMAGE, {"size": {"height": 0, "width": 5}}, ValueError, "each at least 1"),
    "size_half": (IMAGE, {"size": 51.5}, ValueError, "size is 51.5"),
    "size_three": (IMAGE, {"size": (1, 2, 3)}, ValueError, r"size is \(1, 2, 3\)"),
    "resample": (IMAGE, {"resample": 9}, ValueError, r"resample is 9; Pillow's filters are 0 \(nearest\)"),
    "mean": (IMAGE, {"image_mean": "imagenet"}, ValueError, "image_mean is 'imagenet'; give one finite number"),
    "mean_nan": (IMAGE, {"image_mean": [0.5, float("nan"), 1]}, ValueError, "image_mean is .*; give one finite number"),
    "mean_none": (IMAGE, {"image_mean": []}, ValueError, "give one finite number per channel"),
    "lengths": (IMAGE, {"image_mean": [0.5] * 4}, ValueError, "image_mean .* and image_std .* differ in length"),
    "std": (IMAGE, {"image_std": [1, 0, 1]}, ValueError, "a zero in it would divide by zero"),
    "tensorflow": (IMAGE, {"return_tensors": "tf"}, ValueError, "return_tensors is 'tf'; give one of None, 'pt', 'np'"),
    "layout": (IMAGE, {"data_format": "NCHW"}, ValueError, "data_format is 'NCHW'"),
    "input_layout": (IMAGE, {"input_data_format": "NHWC"}, ValueError, "input_data_format is 'NHWC'"),
    "ragged": (
        [IMAGE, IMAGE[1:]],
        {"do_resize": False, "return_tensors": "pt"},
        ValueError,
        r"pixel_values differ in shape, \(3, 7, 9\) and \(3, 8, 9\); resize them \(do_resize=True\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_images_are_refused(case):
    images, options, error, message = REFUSED[case]
    with pytest.raises(error) as caught:
        UperNetImageProcessor()(images, **options)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


REFUSED_MAPS = {
    "count": ([noise(8, 9)] * 2, ValueError, "2 segmentation_maps for 1 images"),
    "size": (noise(9, 8), ValueError, r"segmentation_maps\[0\] is 9 x 8 and images\[0\] 8 x 9 \(height x width\)"),
    "colours": (
        PIL_IMAGE,
        ValueError,
        r"maps\[0\]: has the 3 channels R, G, B, but a label map has one channel",
    ),
    "channels": (IMAGE, ValueError, "8 segmentation_maps for 1 images"),
    "fractions": (noise(8, 9) / 2, ValueError, "holds fractions, NaN or infinite values; labels are whole"),
    "nan": (np.full((8, 9), np.nan), ValueError, "holds fractions, NaN"),
    "inf": (np.full((8, 9), np.inf), ValueError, "holds fractions, NaN or infinite"),
    "mixed": ([noise(8, 9), torch.zeros(8, 9)], TypeError, "segmentation_maps mixes numpy arrays and tensors"),
    "empty": ([], ValueError, "segmentation_maps is empty"),
    "no_pixels": (np.zeros((0, 9), int), ValueError, "0 x 9 .*no pixels"),
    "huge": (np.full((8, 9), 2**40), ValueError, "labels from 1099511627776 to"),
}


@pytest.mark.parametrize("case", REFUSED_MAPS)
def test_bad_maps_are_refused(case):
    maps, error, message = REFUSED_MAPS[case]
    with pytest.raises(error) as caught:
        UperNetImageProcessor()(IMAGE, maps)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json; UperNetImageProcessor\(\)"):
        UperNetImageProcessor.from_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text("{")
    with pytest.raises(OSError, match="not valid JSON"):
        UperNetImageProcessor.from_pretrained(tmp_path)
    path.write_text('{"image_processor_type": "BeitImageProcessor"}')
    with pytest.raises(ValueError, match=r"is for BeitImageProcessor.*AutoImageProcessor"):
        UperNetImageProcessor.from_pretrained(tmp_path)
    path.write_text("{}")
    with pytest.raises(TypeError, match="does not support use_fast=True: images are resized with Pillow"):
        UperNetImageProcessor.from_pretrained(tmp_path, use_fast=True)
    with pytest.raises(TypeError, match="do_resise"):
        UperNetImageProcessor(do_resise=True)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    processor = UperNetImageProcessor()
    processor.save_pretrained(tmp_path)
    before = (tmp_path / "preprocessor_config.json").read_text()
    processor.extra["not json"] = object()
    with pytest.raises(TypeError):
        processor.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == before


def test_rescaled_images_warn_once():
    image = noise(8, 9, 3) / 255
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            UperNetImageProcessor()([image, image / 2])
    assert [str(warning.message).split(",")[0] for warning in caught] == ["an image has values from 0 to 1 only"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UperNetImageProcessor()(image, do_rescale=False)
        UperNetImageProcessor()(IMAGE // 255)  # a dark 8-bit image needs no warning
        UperNetImageProcessor()(IMAGE.astype(float))


def test_neither_transformers_nor_torchvision_is_imported():
    code = (
        "import sys; import fastuper.data.processor as i; import numpy as n; "
        "i.UperNetImageProcessor()(n.zeros((4, 5, 3), n.uint8), n.zeros((4, 5), int), return_tensors='pt'); "
        "assert not {'transformers', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


def test_device_of_the_tensors():
    inputs = UperNetImageProcessor(size=8)(IMAGE, return_tensors="pt", device="meta")
    assert inputs["pixel_values"].is_meta


def test_files_that_cannot_be_read_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.arange(3 * 64 * 64, dtype=np.uint8).reshape(64, 64, 3)).save(whole)
    (tmp_path / "truncated.png").write_bytes(whole.read_bytes()[:100])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    processor = UperNetImageProcessor(size=8)
    assert processor(whole)["pixel_values"][0].shape == (3, 8, 8)
    for name, reason in {
        "truncated.png": r"cannot be decoded \(.*\); the file is truncated or damaged",
        "text.png": "is not an image in a format that Pillow can read",
        "empty.png": "the file is empty",
    }.items():
        with pytest.raises(OSError, match=rf"images\[0\]: .*{name}: {reason}"):
            processor(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"images\[0\]: .*missing\.png: no such file"):
        processor(tmp_path / "missing.png")


def test_the_old_name_of_do_reduce_labels_overrides_too(tmp_path):
    UperNetImageProcessor().save_pretrained(tmp_path)
    assert UperNetImageProcessor.from_pretrained(tmp_path, reduce_labels=True).do_reduce_labels


# The preprocessing of Unified Perceptual Parsing ---------------------------------------------------------------------


def official(image, short=450, longest=1000, multiple=8):
    """The official code's steps: cv2's bilinear filter, BGR, levels from 0 to 255, Caffe's means."""
    height, width = image.shape[:2]
    scale = min(short / float(min(height, width)), longest / float(max(height, width)))
    height, width = (((int(side * scale) - 1) // multiple + 1) * multiple for side in (height, width))
    image = cv2.resize(np.ascontiguousarray(image[:, :, ::-1]), (width, height)).astype(np.float32)
    return image.transpose(2, 0, 1) - np.array([102.9801, 115.9465, 122.7717], np.float32)[:, None, None]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (512, 683, (456, 600)),
        (683, 512, (600, 456)),
        (300, 900, (336, 1000)),  # the longer side is capped
        (225, 331, (456, 664)),  # enlarged
        (900, 1200, (456, 600)),  # both sides become exactly half: cv2 takes the mean
        (456, 608, (456, 600)),
    ],
)
@pytest.mark.parametrize("kind", ["array", "PIL", "file"])
def test_parsing_has_the_official_pixels(height, width, size, kind, tmp_path):
    image = noise(height, width, 3)
    given = {"array": image, "PIL": Image.fromarray(image), "file": tmp_path / "a.png"}[kind]
    if kind == "file":
        Image.fromarray(image).save(given)
    processor = UperNetImageProcessor.for_parsing()
    values = only(processor(given))
    assert values.shape == (3, *size)
    assert processor.output_size(height, width) == size
    np.testing.assert_array_equal(values, official(image), strict=True)


@pytest.mark.parametrize("short", [300, 400, 500, 600])
def test_the_scales_of_the_official_demo(short):
    image = noise(333, 500, 3)
    values = only(UperNetImageProcessor.for_parsing()(image, size={"shortest_edge": short, "longest_edge": 1000}))
    np.testing.assert_array_equal(values, official(image, short), strict=True)


@given(*[st.integers(1, 70)] * 4, st.sampled_from([1, 3, 5]))
@example(40, 60, 20, 30, 3)
@example(20, 60, 20, 31, 1)
@example(1, 1, 7, 9, 3)
def test_interpolation_is_opencvs(height, width, rows, columns, channels):
    image = noise(height, width, channels)
    expected = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR).reshape(rows, columns, channels)
    np.testing.assert_array_equal(interpolate(np.moveaxis(image, -1, 0), rows, columns), np.moveaxis(expected, -1, 0))


@given(st.integers(30, 3000), st.integers(30, 3000), st.integers(100, 800), st.integers(100, 1500), st.integers(1, 64))
@example(333, 500, 600, 1000, 1)
def test_sizes_are_truncated_and_rounded_up(height, width, short, longest, multiple):
    size = {"shortest_edge": short, "longest_edge": longest}
    scale = min(short / float(min(height, width)), longest / float(max(height, width)))
    expected = tuple(((int(side * scale) - 1) // multiple + 1) * multiple for side in (height, width))
    processor = UperNetImageProcessor(size=size, size_divisor=multiple)
    if min(expected) < 1:
        with pytest.raises(ValueError, match="would have no pixels"):
            processor.output_size(height, width)
    else:
        assert processor.output_size(height, width) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"height": 30, "width": 41}, (32, 48)),
        ({"shortest_edge": 33}, (40, 56)),  # 33 x 49.5, truncated to 49
        ({"max_height": 50, "max_width": 50}, (40, 56)),  # 33 x 50
    ],
)
def test_every_form_of_size_is_rounded_up(size, expected):
    assert UperNetImageProcessor(size=size, size_divisor=8).output_size(100, 150) == expected


def test_label_maps_of_parsing():
    """Maps of ids above 255 take the nearest label, at the image's size; channels play no part."""
    labels = np.arange(40 * 60).reshape(40, 60) % 336
    processor = UperNetImageProcessor.for_parsing(size={"shortest_edge": 20, "longest_edge": 100})
    result = processor(noise(40, 60, 3), labels)
    expected = Image.fromarray(labels.astype(np.int32)).resize((32, 24), Image.Resampling.NEAREST)
    assert result["pixel_values"][0].shape == (3, 24, 32)
    np.testing.assert_array_equal(result["labels"][0], np.asarray(expected))


def test_fractions_and_flips():
    """Without rescaling, an image of fractions keeps its range; the channels are reversed without resizing too."""
    image = noise(12, 18, 3)
    options = {"do_rescale": False, "do_normalize": False}
    resized = only(UperNetImageProcessor(size=(7, 9), antialias=False, **options)(image / 255))
    np.testing.assert_allclose(resized, np.moveaxis(cv2.resize(image, (9, 7)), -1, 0) / 255, atol=1e-6)
    flipped = only(UperNetImageProcessor(do_resize=False, do_flip_channel_order=True, **options)(image))
    np.testing.assert_array_equal(flipped, np.moveaxis(image[:, :, ::-1], -1, 0), strict=True)
    floats = UperNetImageProcessor(do_resize=False, do_flip_channel_order=True)
    np.testing.assert_allclose(only(floats(image)), only(floats(image.astype(np.float64))), rtol=1e-6)


def test_the_file_of_parsing(tmp_path):
    """Transformers' class lacks the options, so that the file must not name it."""
    processor = UperNetImageProcessor.for_parsing(do_reduce_labels=True)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == (
        "UperNetImageProcessor"
    )
    assert UperNetImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    for option in ({"size_divisor": 4}, {"antialias": False}, {"do_flip_channel_order": True}):
        assert UperNetImageProcessor(**option).to_dict()["image_processor_type"] == "UperNetImageProcessor"
    without = UperNetImageProcessor(antialias=True, do_flip_channel_order=False).to_dict()
    assert without["image_processor_type"] == "SegformerImageProcessor"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_divisor": 0}, "size_divisor must be a whole number of at least 1"),
        ({"size_divisor": 1.5}, "size_divisor must be a whole number of at least 1"),
        ({"antialias": False, "resample": 3}, "antialias=False is bilinear, and resample is 3; leave out one of them"),
    ],
)
def test_wrong_options_of_parsing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UperNetImageProcessor(**options)


def test_channels_of_other_numbers_are_not_flipped():
    processor = UperNetImageProcessor(do_flip_channel_order=True, image_mean=[0.5], image_std=[0.5])
    with pytest.raises(ValueError, match=r"images\[0\] has 1 channels; do_flip_channel_order reverses three"):
        processor(noise(8, 8, 1))
