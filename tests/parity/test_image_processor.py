"""`UperNetImageProcessor` against Transformers' Segformer image processor: equal bits, files and label maps."""

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench.pairs import VERSION_5
from fastuper.data.images import read_image
from fastuper.data.processor import UperNetImageProcessor

transformers = pytest.importorskip("transformers")
data = pytest.importorskip("skimage.data")
load_image = pytest.importorskip("transformers.image_utils").load_image

try:  # 5.x: a module per backend
    from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil as Segformer
except ImportError:  # 4.x: the class without a suffix uses Pillow
    from transformers.models.segformer.image_processing_segformer import SegformerImageProcessor as Segformer

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
SIZES = ((512, 512), (384, 640), (333, 517), (1024, 768))


def photo(name):
    return getattr(data, name)()


def random_image(seed, shape, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def assert_same(ours, theirs):
    """Equal keys, dtypes, shapes and bits, for dictionaries of arrays, tensors or lists of them."""
    assert set(ours) == set(theirs)
    for key in ours:
        our_value, their_value = ours[key], theirs[key]
        assert type(our_value) is type(their_value)
        if not isinstance(our_value, list):
            our_value, their_value = [our_value], [their_value]
        assert len(our_value) == len(their_value)
        for a, b in zip(our_value, their_value, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


def assert_both(images, maps=None, options=None, **call):
    """Process with both classes; Transformers' class writes into the maps, so it gets a copy."""
    theirs_maps = maps.copy() if isinstance(maps, np.ndarray) else maps
    ours = UperNetImageProcessor(**(options or {}))(images, maps, **call)
    assert_same(ours, Segformer(**(options or {}))(images, theirs_maps, **call))
    return ours


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", PHOTOS)
def test_photographs(name, size):
    pixels = photo(name)
    labels = random_image(1, pixels.shape[:2])
    options = {"size": {"height": size[0], "width": size[1]}, "do_reduce_labels": True}
    assert_both(Image.fromarray(pixels), labels, options, return_tensors="pt")


@pytest.mark.parametrize("resample", list(Image.Resampling), ids=lambda resample: resample.name.lower())
def test_resampling_filters(resample):
    assert_both(photo("chelsea"), options={"size": {"height": 97, "width": 201}, "resample": resample})


@pytest.mark.parametrize("do_resize", [True, False], ids=["resize", ""])
@pytest.mark.parametrize("do_rescale", [True, False], ids=["rescale", ""])
@pytest.mark.parametrize("do_normalize", [True, False], ids=["normalize", ""])
@pytest.mark.parametrize("kind", ["pil", "uint8", "int64", "float32", "float16"])
def test_steps_left_out(kind, do_resize, do_rescale, do_normalize):
    image = Image.fromarray(photo("chelsea")) if kind == "pil" else photo("chelsea").astype(kind)
    options = {
        "do_resize": do_resize,
        "do_rescale": do_rescale,
        "do_normalize": do_normalize,
        "size": {"height": 65, "width": 43},
    }
    assert_both(image, options=options, return_tensors="np")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("do_resize", [True, False], ids=["resize", "as_is"])
def test_fractions_of_one(dtype, do_resize):
    """Floats from 0 to 1: truncated to 8 bits if they are resized, unchanged if not."""
    image = (photo("coffee")[:211, :307] / 255).astype(dtype)
    options = {"do_rescale": False, "do_resize": do_resize, "size": {"height": 50, "width": 77}}
    assert_both(image, options=options)
    with pytest.warns(UserWarning, match="do_rescale=False"):
        assert_both(image, options={**options, "do_rescale": True})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16, np.uint16, np.int32])
def test_any_numbers_without_resizing(dtype):
    image = (np.random.default_rng(3).standard_normal((3, 31, 17)) * 1000).astype(dtype)
    for do_rescale in (True, False):
        assert_both(image, options={"do_resize": False, "do_rescale": do_rescale})


def test_statistics_and_factor():
    image = Image.fromarray(photo("rocket"))
    assert_both(
        image, options={"rescale_factor": 1 / 127.5, "image_mean": [0.5, 0.4, 0.3], "image_std": (0.5, 0.6, 0.7)}
    )
    assert_both(image, options={"image_mean": 0.45, "image_std": 0.2})
    assert_both(image, options={"do_rescale": False, "image_mean": [123.675, 116.28, 103.53], "image_std": 57.0})


def test_one_grey_channel():
    options = {"image_mean": [0.4], "image_std": [0.3], "size": {"height": 41, "width": 59}}
    with not_in_transformers_4():
        assert_both(Image.fromarray(photo("camera")), options=options)
    assert_both(photo("camera")[None], options=options)


def not_in_transformers_4():
    """Expect 4.x to refuse images of two dimensions."""
    if transformers.__version__.startswith("4."):
        return pytest.raises(ValueError, match="dimensions")
    return contextlib.nullcontext()


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("channels", [2, 4])
def test_other_numbers_of_channels(channels, layout):
    """Both resize them as one Pillow image with alpha."""
    shape = (channels, 61, 47) if layout == "channels_first" else (61, 47, channels)
    options = {"image_mean": [0.1] * channels, "image_std": [0.3] * channels, "size": {"height": 40, "width": 55}}
    assert_both(random_image(5, shape), options=options, input_data_format=layout)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_thirteen_channels(layout):
    """Transformers cannot resize them: compare without resizing, and with each channel resized alone."""
    shape = (13, 61, 47) if layout == "channels_first" else (61, 47, 13)
    image = random_image(6, shape)
    options = {"image_mean": list(np.linspace(0.1, 0.7, 13)), "image_std": list(np.linspace(0.2, 0.9, 13))}
    assert_both(image, options={**options, "do_resize": False}, input_data_format=layout)

    size = {"height": 33, "width": 50}
    ours = UperNetImageProcessor(size=size, **options)(image, input_data_format=layout)["pixel_values"][0]
    for channel, plane in enumerate(image if layout == "channels_first" else np.moveaxis(image, -1, 0)):
        single = Segformer(
            size=size, image_mean=options["image_mean"][channel], image_std=options["image_std"][channel]
        )
        expected = single(plane[None], input_data_format="channels_first")["pixel_values"][0]
        np.testing.assert_array_equal(ours[channel], expected[0], strict=True)


def test_pil_with_alpha_for_four_channels():
    image = Image.fromarray(random_image(7, (61, 47, 4)))
    options = {"image_mean": [0.5] * 4, "image_std": [0.25] * 4, "size": {"height": 20, "width": 30}}
    theirs = Segformer(**options)(np.asarray(image), input_data_format="channels_last")
    assert_same(UperNetImageProcessor(**options)(image), theirs)


@settings(max_examples=120, deadline=None)
@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    target=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    channels=st.sampled_from([1, 3, 4]),
    layout=st.sampled_from(["channels_first", "channels_last"]),
    dtype=st.sampled_from([np.uint8, np.int32, np.float32]),
    steps=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    resample=st.sampled_from(list(Image.Resampling)),
    seed=st.integers(0, 2**31),
)
def test_any_size(size, target, channels, layout, dtype, steps, resample, seed):
    shape = (channels, *size) if layout == "channels_first" else (*size, channels)
    options = dict(zip(("do_resize", "do_rescale", "do_normalize", "do_reduce_labels"), steps, strict=True))
    options |= {"size": {"height": target[0], "width": target[1]}, "resample": resample}
    options |= {"image_mean": [0.3] * channels, "image_std": [0.7] * channels}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the values of a one-pixel image may all be 0 or 1
        assert_both(random_image(seed, shape, dtype), random_image(seed, size), options, input_data_format=layout)


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
@pytest.mark.parametrize("form", ["list", "tuple", "batch", "one"])
@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_batches(kind, form, return_tensors):
    images, maps = random_image(8, (3, 3, 40, 52)), random_image(9, (3, 40, 52))
    if kind == "tensor":
        images, maps = torch.from_numpy(images), torch.from_numpy(maps)
    if form in ("list", "tuple"):
        images = list(images) if form == "list" else tuple(images)
        maps = list(maps)
    elif form == "one":
        images, maps = images[0], maps[0]
    ours = assert_both(images, maps, {"size": {"height": 31, "width": 30}}, return_tensors=return_tensors)
    assert len(ours["labels"]) == (1 if form == "one" else 3)


def test_images_of_different_sizes():
    images = [Image.fromarray(photo(name)) for name in PHOTOS]
    maps = [Image.fromarray(random_image(10, image.size[::-1])) for image in images]
    assert_both(images, maps, return_tensors="pt")
    assert_both(images, maps, {"do_resize": False})


@pytest.mark.parametrize("do_reduce_labels", [True, False], ids=["reduced", "as_is"])
@pytest.mark.parametrize("do_resize", [True, False], ids=["resize", ""])
@pytest.mark.parametrize("kind", ["L", "P", "I", "F", "uint8", "int16", "int32", "int64", "tensor"])
def test_segmentation_maps(kind, do_resize, do_reduce_labels):
    labels = np.arange(256, dtype=np.uint8).repeat(11).reshape(64, 44)  # all 8-bit labels
    if kind == "P":
        maps = Image.fromarray(labels, "L")
        maps.putpalette(list(range(256)) * 3)
    elif kind in ("L", "I", "F"):
        maps = Image.fromarray(labels).convert(kind)
    elif kind == "tensor":
        maps = torch.from_numpy(labels.astype(np.int64))
    else:
        maps = labels.astype(kind)
    theirs_maps = maps.clone() if kind == "tensor" else maps.copy()
    options = {"do_resize": do_resize, "do_reduce_labels": do_reduce_labels, "size": {"height": 51, "width": 77}}
    image = random_image(11, (64, 44, 3))
    ours = UperNetImageProcessor(**options)(image, maps, return_tensors="pt")
    assert_same(ours, Segformer(**options)(image, theirs_maps, return_tensors="pt"))


@pytest.mark.parametrize("do_resize", [True, False], ids=["resize", ""])
def test_segmentation_maps_of_one_bit(do_resize):
    maps = Image.fromarray(random_image(16, (64, 44)) < 128)
    assert_both(random_image(11, (64, 44, 3)), maps, {"do_resize": do_resize, "size": {"height": 51, "width": 77}})


def pictures():
    """One picture in each mode, with the suffix of a file that holds the mode."""
    rgb = Image.fromarray(random_image(12, (23, 31, 3)))
    alpha = Image.fromarray(random_image(13, (23, 31)))
    found = {mode: (rgb.convert(mode), "png") for mode in ("1", "L", "P", "RGB", "LA", "RGBA")}
    for mode in ("LA", "RGBA"):
        found[mode][0].putalpha(alpha)
    for mode, transparent in (("P", bytes(range(256))), ("L", 7), ("RGB", (1, 2, 3))):
        image = rgb.convert(mode)
        image.info["transparency"] = transparent
        found[f"{mode}-transparent"] = (image, "png")
    gif = rgb.convert("P")
    gif.info["transparency"] = 5
    found["P-gif"] = (gif, "gif")
    found["CMYK"] = (rgb.convert("CMYK"), "tif")
    found["CMYK-jpeg"] = (rgb.convert("CMYK"), "jpg")
    found["YCbCr-jpeg"] = (rgb, "jpg")
    found["LAB"] = (Image.frombytes("LAB", rgb.size, rgb.tobytes()), "tif")
    found["RGBA-webp"] = (found["RGBA"][0], "webp")
    return found


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", pictures())
def test_files_of_every_mode(mode, orientation, tmp_path):
    """5.x reads files as `load_image` does; 4.x has that function, whose image its processor takes."""
    image, suffix = pictures()[mode]
    path = str(tmp_path / f"photo.{suffix}")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    # Pillow mixes up the pixels of an uncompressed TIFF that it opens by its name and turns.
    mixed_up = (mode, orientation) == ("CMYK", 6)
    loaded = load_image(Image.open(io.BytesIO(Path(path).read_bytes())) if mixed_up else path)
    np.testing.assert_array_equal(np.asarray(read_image(path)), np.asarray(loaded), strict=True)
    given = loaded if transformers.__version__.startswith("4.") or mixed_up else path
    for options in ({}, {"image_mean": 0.4, "image_std": 0.2}, {"do_normalize": False, "do_resize": False}):
        assert_same(UperNetImageProcessor(**options)(path), Segformer(**options)(given))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_files_of_16_bits_are_scaled_where_transformers_makes_them_white(suffix, tmp_path):
    values = np.arange(0, 65536, 91, dtype=np.uint16)[:720].reshape(24, 30)
    path = str(tmp_path / f"grey.{suffix}")
    Image.fromarray(values).save(path)
    np.testing.assert_array_equal(np.asarray(load_image(path))[..., 0], values.clip(max=255))
    np.testing.assert_array_equal(np.asarray(read_image(path))[..., 0], np.round(values / 257))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_files_of_32_bits_are_refused_where_transformers_clips_them(dtype, tmp_path):
    values = np.array([[-1000, 0, 100, 255, 1000]], dtype)
    path = str(tmp_path / "depth.tif")
    Image.fromarray(values).save(path)
    np.testing.assert_array_equal(np.asarray(load_image(path))[..., 0], values.clip(0, 255))
    with pytest.raises(ValueError, match="no value stands for white"):
        UperNetImageProcessor()(path)


@pytest.mark.parametrize("statistics", [[0.4], 0.4], ids=["one", "any"])
@pytest.mark.parametrize("mode", ["L", "I", "F"])
def test_open_images_of_one_channel(mode, statistics):
    levels = random_image(14, (23, 31))
    options = {"image_mean": statistics, "image_std": statistics, "size": {"height": 40, "width": 30}}
    with not_in_transformers_4():
        assert_both(Image.fromarray(levels).convert(mode), options=options)
    if mode != "L":
        numbers = Image.fromarray(levels.astype(np.int32) * 1000 - 7).convert(mode)
        with not_in_transformers_4():
            assert_both(numbers, options={**options, "do_resize": False})


def test_an_open_image_keeps_its_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(random_image(15, (23, 31, 3))).save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as image:
        assert_both(image)


@pytest.mark.parametrize("mode", [mode for mode, (image, _) in pictures().items() if image.mode not in ("RGB", "LAB")])
def test_open_images_that_transformers_refuses(mode):
    """With statistics of three channels: our result is that of Pillow's conversion to RGB."""
    image, _ = pictures()[mode]
    with pytest.raises(ValueError, match=r"mean must have|dimensions|infer channel"):
        Segformer()(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's, of palettes with transparency
        converted = image.convert("RGB")
    assert_same(UperNetImageProcessor()(image), Segformer()(converted))


def test_options_of_one_call():
    image = photo("chelsea")
    for call in (
        {"size": {"height": 10, "width": 20}, "resample": 0},
        {"do_resize": False, "do_rescale": False},
        {"do_normalize": False, "rescale_factor": 0.5},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0], "do_reduce_labels": True},
    ):
        assert_both(image, photo("chelsea")[..., 0].copy(), **call)


def test_what_cannot_be_resized_is_refused_by_both():
    for image in (np.full((3, 8, 8), 0.5) * 3, np.full((3, 8, 8), -0.5), np.full((3, 8, 8), 300)):
        for processor in (UperNetImageProcessor(), Segformer()):
            with pytest.raises(ValueError, match=r"from 1\.5|from -0\.5|from 300|outside the range"):
                processor(image)


def test_other_backend_is_within_one_level():
    """Check the docstring's figures for the torchvision backend, which AutoImageProcessor prefers in 5.x."""
    pytest.importorskip("torchvision")
    try:
        from transformers.models.segformer.image_processing_segformer_fast import SegformerImageProcessorFast as Other
    except ImportError:
        from transformers.models.segformer.image_processing_segformer import SegformerImageProcessor as Other
    deviation = np.array(UperNetImageProcessor().image_std)[:, None, None]
    for name in PHOTOS:
        for height, width in SIZES:
            options = {"size": {"height": height, "width": width}}
            image = Image.fromarray(photo(name))
            ours = UperNetImageProcessor(**options)(image, return_tensors="np")["pixel_values"][0]
            other = Other(**options)(image, return_tensors="pt")["pixel_values"][0].numpy()
            levels = np.abs(ours.astype(np.float64) - other) * deviation * 255
            assert levels.max() < 1.001
            assert np.abs(ours - other).max() < 0.0176
            assert levels.mean() < 0.16


@pytest.mark.parametrize("option", [{"size_divisor": 8}, {"antialias": False}, {"do_flip_channel_order": True}])
def test_auto_refuses_options_that_transformers_lacks(option, tmp_path):
    UperNetImageProcessor(**option).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized image processor"):
        transformers.AutoImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("limit", [1, 30_000, 1 << 26])
def test_post_processing(limit, layout, dtype, monkeypatch):
    """Any number of rows is resized at a time. The logits are coarse, so that many are equal.

    Labels are equal wherever the two best classes are not tied: we resize in float32, Transformers in the dtype of the
    logits. Transformers rounds channels_last logits differently, so it gets contiguous logits.
    """
    monkeypatch.setattr(sys.modules["fastuper_kernels.cpu.argmax"], "BLOCK_BYTES", limit)
    logits = torch.randn(3, 19, 33, 21, generator=torch.Generator().manual_seed(0)).mul(2).round().div(2)
    outputs = SimpleNamespace(logits=logits.to(dtype).contiguous(memory_format=layout))
    contiguous = SimpleNamespace(logits=outputs.logits.contiguous())
    sizes = [(101, 67), (33, 21), (16, 90)]
    for target_sizes in (None, sizes, torch.tensor(sizes)):
        ours = UperNetImageProcessor().post_process_semantic_segmentation(outputs, target_sizes)
        # Transformers converts a tensor of sizes to numbers that recent versions of PyTorch refuse.
        theirs_sizes = sizes if isinstance(target_sizes, torch.Tensor) else target_sizes
        theirs = Segformer().post_process_semantic_segmentation(contiguous, theirs_sizes)
        assert len(ours) == len(theirs) == 3
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype == torch.int64
            assert a.shape == b.shape
        for a, b, image in zip(ours, theirs, logits.double(), strict=True):
            best = torch.nn.functional.interpolate(image[None], size=a.shape, mode="bilinear")[0].topk(2, dim=0).values
            decided = best[0] - best[1] > 8 * torch.finfo(dtype).eps * image.abs().max()
            assert decided.any()
            assert torch.equal(a[decided], b[decided])


OPTIONS = {
    "do_resize": True,
    "size": {"height": 51, "width": 77},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 0.01,
    "do_normalize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "do_reduce_labels": True,
}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "all"])
def test_transformers_reads_our_files(options, tmp_path):
    ours = UperNetImageProcessor(**options)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    assert isinstance(theirs, Segformer)
    for name in ours.to_dict().keys() - {"image_processor_type"}:
        read, value = getattr(theirs, name), getattr(ours, name)
        assert (tuple(read) if isinstance(read, list) else read) == value, name
    labels = photo("chelsea")[..., 0]
    assert_same(ours(photo("chelsea"), labels), theirs(photo("chelsea"), labels.copy()))


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "all"])
def test_we_read_files_of_transformers(options, tmp_path):
    theirs = Segformer(**options)
    theirs.save_pretrained(tmp_path)
    ours = UperNetImageProcessor.from_pretrained(tmp_path)
    labels = photo("chelsea")[..., 0]
    assert_same(ours(photo("chelsea"), labels), theirs(photo("chelsea"), labels.copy()))
    before = json.loads((tmp_path / "preprocessor_config.json").read_text())
    ours.save_pretrained(tmp_path)
    after = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert {**after, "image_processor_type": before["image_processor_type"]} == before


def tiny_model():
    config = transformers.UperNetConfig(
        backbone_config=transformers.ConvNextConfig(
            hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
        ),
        hidden_size=16,
        num_labels=7,
        auxiliary_in_channels=16,
        auxiliary_channels=8,
        use_auxiliary_head=False,
    )
    torch.manual_seed(0)
    return transformers.UperNetForSemanticSegmentation(config).eval()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_in_a_pipeline(batch_size, tmp_path):
    images = [Image.fromarray(photo(name)) for name in ("chelsea", "coffee")]
    size = {"height": 64, "width": 96}
    results = []
    for processor in (UperNetImageProcessor(size=size), Segformer(size=size)):
        pipeline = transformers.pipeline(
            "image-segmentation", model=tiny_model(), image_processor=processor, device="cpu"
        )
        results.append(pipeline(images, batch_size=batch_size))
    pipeline.image_processor = UperNetImageProcessor(size=size)
    pipeline.save_pretrained(tmp_path)
    assert UperNetImageProcessor.from_pretrained(tmp_path).size == size
    for image, ours, theirs in zip(images, *results, strict=True):
        with torch.no_grad():
            logits = tiny_model()(**processor(image, return_tensors="pt")).logits.double()
        full = torch.nn.functional.interpolate(logits, size=image.size[::-1], mode="bilinear")
        best = full[0].topk(2, dim=0).values
        # Sums in another order may decide a tie differently.
        decided = (best[0] - best[1] > 8 * torch.finfo(torch.float32).eps * full.abs().max()).numpy()
        assert decided.mean() > 0.999
        assert [part["label"] for part in ours] == [part["label"] for part in theirs]
        assert len(ours) > 1
        for our_part, their_part in zip(ours, theirs, strict=True):
            assert our_part["mask"].size == image.size
            masks = (np.asarray(part["mask"])[decided] for part in (our_part, their_part))
            np.testing.assert_array_equal(*masks)


def test_model_takes_the_batch():
    inputs = UperNetImageProcessor(size=64, do_reduce_labels=True)(
        photo("chelsea"), photo("chelsea")[..., 0] % 8, return_tensors="pt"
    )
    with torch.no_grad():
        outputs = tiny_model()(**inputs.to("cpu"))
        again = tiny_model()(pixel_values=inputs.pixel_values, labels=inputs["labels"])
    assert torch.equal(outputs.logits, again.logits)
    assert outputs.loss.isfinite()
    assert torch.equal(outputs.loss, again.loss)


# ------------------------------------------------------------------------- options, methods and attributes of the class

DOCUMENT = (Path(__file__).parents[2] / "docs" / "differences.md").read_text(encoding="utf-8")
BACKENDS = {transformers.SegformerImageProcessor, Segformer}
# docs/differences.md has the reasons.
LEFT_OUT = {
    *("center_crop", "pad", "convert_to_rgb", "process_image", "fetch_images", "rescale_and_normalize"),
    "register_for_auto_class",
}


def public(value):
    return {name for name in dir(value) if not name.startswith("_")}


def test_every_public_name_is_there_or_listed():
    ours, seen = UperNetImageProcessor(), set()
    for backend in BACKENDS:
        theirs = backend()
        missing = public(theirs) - public(ours)
        assert missing <= LEFT_OUT
        assert public(backend) - public(UperNetImageProcessor) <= LEFT_OUT
        seen |= missing
        for name in public(theirs) & public(ours) - {"backend", "valid_kwargs"}:
            value, expected = getattr(ours, name), getattr(theirs, name)
            assert callable(value) == callable(expected), name
            if not callable(value):
                assert (tuple(expected) if isinstance(expected, list) else expected) == (
                    tuple(value) if isinstance(value, list) else value
                ), name
    assert seen == LEFT_OUT if VERSION_5 else seen <= LEFT_OUT
    assert [name for name in LEFT_OUT if f"`{name}`" not in DOCUMENT] == []
    assert Segformer().to_dict()["image_processor_type"] == ours.to_dict()["image_processor_type"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"shortest_edge": 32}},
        {"size": 40, "image_mean": [0.1, 0.2, 0.3], "do_normalize": False},
        {"size": (40, 50), "image_mean": 0.5, "image_std": 0.25},
        {"do_resize": None, "do_reduce_labels": True, "resample": 0},
    ],
    ids=["defaults", "edge", "number", "pair", "none"],
)
def test_dictionaries_and_json(options, tmp_path):
    ours = UperNetImageProcessor(**options)
    for backend in BACKENDS:
        theirs = backend(**options)
        if VERSION_5:
            assert ours.to_dict() == theirs.to_dict()
            assert ours.to_json_string() == theirs.to_json_string()
            assert repr(ours).split(" ", 1)[1] == repr(theirs).split(" ", 1)[1]
        theirs.to_json_file(tmp_path / "theirs.json")
        read = UperNetImageProcessor.from_json_file(tmp_path / "theirs.json")
        assert {name: getattr(read, name) for name in options} == {name: getattr(ours, name) for name in options}
        ours.to_json_file(tmp_path / "ours.json")
        assert (tmp_path / "ours.json").read_text(encoding="utf-8") == ours.to_json_string()
        assert backend.from_json_file(tmp_path / "ours.json").size == theirs.size
        ours.save_pretrained(tmp_path)
        expected, unused = backend.get_image_processor_dict(tmp_path, foo=1, cache_dir=None)
        assert UperNetImageProcessor.get_image_processor_dict(tmp_path, foo=1, cache_dir=None) == (expected, {"foo": 1})
        assert unused == {"foo": 1}


SIZE_FORMS = [
    *({"shortest_edge": 32}, {"shortest_edge": 33, "longest_edge": 40}, {"shortest_edge": 50, "longest_edge": 50}),
    *({"max_height": 40, "max_width": 37}, {"max_height": 99, "max_width": 20}, {"height": 31, "width": 47}),
    *(35, (31, 47), [47, 31], {"longest_edge": 40}, {"min_pixels": 5, "max_pixels": 900}),
]


@pytest.mark.skipif(not VERSION_5, reason="4.x knows only a height and a width")
@pytest.mark.parametrize("size", SIZE_FORMS, ids=str)
@pytest.mark.parametrize("shape", [(60, 50), (50, 60), (50, 50), (33, 200)], ids=str)
def test_forms_of_sizes(size, shape):
    image, labels = random_image(0, (*shape, 3)), random_image(1, shape)
    backends = {"pil": Segformer, "torchvision": transformers.SegformerImageProcessor}
    for name, backend in backends.items():
        try:
            expected = backend(size=size)(Image.fromarray(image), labels.copy(), return_tensors="pt")
        except ValueError:
            with pytest.raises(ValueError, match="cannot be resized to the size"):
                UperNetImageProcessor(size=size)(Image.fromarray(image), labels)
            continue
        ours = UperNetImageProcessor(size=size)
        result = ours(Image.fromarray(image), labels, return_tensors="pt")
        assert result["pixel_values"].shape == expected["pixel_values"].shape
        assert result["pixel_values"].shape[2:] == ours.output_size(*shape)
        if name == "pil":
            assert_same(result, expected)
        again = UperNetImageProcessor()(image, labels, size=backend(size=size).size, return_tensors="pt")  # a SizeDict
        assert_same(again, result)
        assert ours.size.shortest_edge == backend(size=size).size.shortest_edge
        assert ours.size.height == backend(size=size).size.height


@pytest.mark.skipif(not VERSION_5, reason="4.x knows only a height and a width")
@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 400)] * 6))
def test_sizes_are_rounded_as_in_transformers(numbers):
    from transformers.image_transforms import get_size_with_aspect_ratio
    from transformers.image_utils import get_image_size_for_max_height_width

    height, width, edge, longest, most_high, most_wide = numbers
    frame = {"max_height": most_high, "max_width": most_wide}
    for size, expected in (
        ({"shortest_edge": edge, "longest_edge": longest}, get_size_with_aspect_ratio((height, width), edge, longest)),
        (frame, get_image_size_for_max_height_width((height, width), most_high, most_wide)),
    ):
        if min(expected) > 0:
            assert UperNetImageProcessor(size=size).output_size(height, width) == tuple(expected)
        else:
            with pytest.raises(ValueError, match="would have no pixels"):
                UperNetImageProcessor(size=size).output_size(height, width)


@pytest.mark.skipif(not VERSION_5, reason="an argument of 5.x")
@pytest.mark.parametrize("sizes", [None, [(17, 23), (4, 9)], [(8, 11), (5, 40)]], ids=["own", "list", "same"])
def test_segmentation_scores(sizes):
    generator = torch.Generator().manual_seed(0)
    outputs = SimpleNamespace(logits=torch.randn(2, 5, 8, 11, generator=generator))
    ours = UperNetImageProcessor().post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
    for backend in BACKENDS:
        theirs = backend().post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
        assert len(ours) == len(theirs) == 2
        for a, b in zip(ours, theirs, strict=True):
            assert set(a) == set(b)
            assert torch.equal(a.segmentation, b.segmentation)
            torch.testing.assert_close(a["segmentation_scores"], b["segmentation_scores"])
    plain = UperNetImageProcessor().post_process_semantic_segmentation(outputs, sizes)
    assert all(torch.equal(a, b.segmentation) for a, b in zip(plain, ours, strict=True))
    if sizes is not None:
        by_tensor = UperNetImageProcessor().post_process_semantic_segmentation(outputs, torch.tensor(sizes), True)
        assert all(torch.equal(a, b.segmentation) for a, b in zip(plain, by_tensor, strict=True))


def test_scores_of_one_class():
    outputs = SimpleNamespace(logits=torch.tensor([[[[-1.0, 1.0]]]]))
    (only,) = UperNetImageProcessor().post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    assert torch.equal(only.segmentation, torch.tensor([[0, 1]]))
    assert torch.equal(only.segmentation_scores, torch.tensor([[[-1.0, 1.0]]]))


@pytest.mark.skipif(not VERSION_5, reason="an option of 5.x")
@pytest.mark.parametrize("kind", ["L", "RGBA", "P", "array 1", "array 4", "float 4", "array 3"])
def test_conversion_to_rgb(kind):
    pixels = random_image(0, (40, 50, int(kind[-1]) if kind[-1].isdigit() else 4))
    image = pixels / 255 if kind.startswith("float") else pixels
    if not kind[-1].isdigit():
        image = Image.fromarray(pixels).convert(kind)
    options = {"do_convert_rgb": True, "size": 32, "do_rescale": not kind.startswith("float")}
    assert_both(image, options=options, return_tensors="pt")


@pytest.mark.skipif(not VERSION_5, reason="4.x has other arguments")
def test_steps_alone():
    image, labels = random_image(0, (3, 40, 50)), random_image(1, (40, 50))
    theirs, ours = Segformer(), UperNetImageProcessor()
    size = theirs.size | {"height": 20, "width": 31}
    np.testing.assert_array_equal(ours.resize(image, size), theirs.resize(image, size), strict=True)
    np.testing.assert_array_equal(ours.resize(image, size, 0), theirs.resize(image, size, 0), strict=True)
    np.testing.assert_array_equal(ours.rescale(image, 0.1), theirs.rescale(image, 0.1), strict=True)
    for array in (image, image.astype(np.float32)):
        values = (array, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
        np.testing.assert_array_equal(ours.normalize(*values), theirs.normalize(*values), strict=True)
    np.testing.assert_array_equal(ours.reduce_label(labels), theirs.reduce_label(labels.copy()), strict=True)
    with pytest.raises(ValueError, match="the image has 3 channels"):
        ours.normalize(image, [0.5] * 4, [0.5] * 4)


@pytest.mark.skipif(not VERSION_5, reason="4.x has no defaults of the class")
def test_subclasses_and_options_of_the_call():
    changes = {"size": {"height": 20, "width": 30}, "do_normalize": False, "image_mean": (0.5, 0.5, 0.5)}
    image = random_image(0, (40, 50, 3))
    results = []
    for base in (Segformer, UperNetImageProcessor):
        processor = type("Mine", (base,), changes)(return_tensors="np", default_to_square=False)
        assert (processor.do_normalize, processor.image_mean) == (False, (0.5, 0.5, 0.5))
        assert processor(image, size=25, default_to_square=False)["pixel_values"].shape == (1, 3, 25, 31)
        assert processor.size == {"height": 20, "width": 30}
        results.append(processor(image))
        assert "return_tensors" in processor.to_dict()
    assert_same(results[1], results[0])
