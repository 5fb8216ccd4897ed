"""int8: which photos calibrate and which judge, what is compared, and what is refused."""

from __future__ import annotations

import logging
import os

import numpy as np
import onnx
import openvino
import pytest
import torch
from PIL import Image
from torch import nn

from fastuper.data import UperNetImageProcessor
from fastuper.evaluation import ConfusionMatrix
from fastuper.export import export_model, int8
from fastuper.export.formats import format_of
from fastuper.export.int8 import Operation, Photos
from fastuper.export.openvino import core
from fastuper.export.settings import ExportError, ExportSettings, ProofError
from fastuper.scenes import ID2LABEL, MODEL, SceneDataset, load_model, scene

NAMES = {0: "left", 1: "right"}


def save_photos(folder, count=10, size=(20, 24)):
    """Write photos of one grey level each; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for level in range(count):
        Image.new("RGB", size[::-1], (level, level, level)).save(folder / f"{level:03}.png")
    return folder


def save_labels(folder, count=10, size=(20, 24)):
    """Write label maps whose left half is class 0 and whose right half class 1; return the label map."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.zeros(size, np.uint8)
    labels[:, size[1] // 2 :] = 1
    for number in range(count):
        Image.fromarray(labels).save(folder / f"{number:03}.png")
    return labels


def photos_of(folder, id2label=NAMES, **options):
    processor = UperNetImageProcessor(size={"height": 32, "width": 48}, image_mean=0.0, image_std=1.0)
    return Photos(folder, ExportSettings(**options), processor, id2label)


def levels(photos, numbers):
    """Return the grey levels of photos."""
    return [round(float(photos.read(number)[0]["pixel_values"].mean() * 255)) for number in numbers]


def test_every_fifth_photo_judges_and_no_other(tmp_path):
    photos = photos_of(save_photos(tmp_path, 13))
    assert levels(photos, photos.judging) == [4, 9]
    assert levels(photos, photos.calibrating) == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12]


def test_of_a_large_folder_photos_of_all_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "MOST_PHOTOS", 10)
    photos = photos_of(save_photos(tmp_path, 28))
    assert photos.found == 28
    chosen = sorted([*levels(photos, photos.judging), *levels(photos, photos.calibrating)])
    assert chosen == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]


@pytest.mark.parametrize(
    ("options", "shape", "target"),
    [
        ({}, (1, 3, 32, 48), None),
        ({"size": "40x64"}, (1, 3, 40, 64), None),
        ({"labels": True, "target_size": True}, (1, 3, 32, 48), [32, 48]),
        ({"with_preprocessing": True, "labels": True, "target_size": True}, (1, 20, 24, 3), [20, 24]),
        ({"with_preprocessing": True, "size": "40x64"}, (1, 40, 64, 3), None),
    ],
)
def test_a_photo_as_inputs(options, shape, target, tmp_path):
    arrays, label = photos_of(save_photos(tmp_path), **options).read(3)
    name = "images" if options.get("with_preprocessing") else "pixel_values"
    assert arrays[name].shape == shape
    assert arrays[name].dtype == (np.uint8 if name == "images" else np.float32)
    assert (arrays[name] == (3 if name == "images" else np.float32(3 / 255))).all()
    assert arrays.keys() == ({name} if target is None else {name, "target_size"})
    if target is not None:
        assert arrays["target_size"].dtype == np.int64
        assert arrays["target_size"].tolist() == target
    assert label is None


def test_label_maps_lie_beside(tmp_path):
    save_photos(tmp_path / "images")
    expected = save_labels(tmp_path / "labels")
    photos = photos_of(tmp_path)
    assert (photos.read(7)[1] == expected).all()
    assert levels(photos, [7]) == [7]
    assert photos_of(tmp_path, id2label=None).read(7)[1] is None  # a parsing model


def test_the_validation_split_is_taken(tmp_path):
    for split, count in (("training", 12), ("validation", 10)):
        save_photos(tmp_path / "images" / split, count)
        save_labels(tmp_path / "labels" / split, count)
    assert photos_of(tmp_path).found == 10


def few(folder):
    save_photos(folder, 9)
    return "holds 9 photos; give 10 or more"


def empty(folder):
    folder.mkdir(exist_ok=True)
    return "holds 0 photos; give 10 or more"


def missing(folder):
    folder.rmdir()
    return "there is no such folder"


def unreadable(folder):
    save_photos(folder)
    (folder / "005.png").write_bytes(b"GIF89a?")
    return "005.png"


def other_labels(folder):
    save_photos(folder / "images")
    save_labels(folder / "labels")
    Image.new("L", (24, 20), 2).save(folder / "labels" / "003.png")
    return "003.png: holds the label 2, but there are 2 classes"


def other_names(folder):
    other_labels(folder)
    (folder / "classes.txt").write_text("right\nleft\n")
    return "in another order"


def no_label_map(folder):
    save_photos(folder / "images")
    save_labels(folder / "labels", 9)
    return "have no label map of the same name"


def another_size(folder):
    save_photos(folder / "images", size=(24, 24))
    save_labels(folder / "labels")
    return "must have the same size"


@pytest.mark.parametrize(
    "make", [few, empty, missing, unreadable, other_labels, other_names, no_label_map, another_size]
)
def test_a_folder_that_cannot_be_used(make, tmp_path):
    fault = make(tmp_path)
    with pytest.raises(ExportError) as error:
        photos_of(tmp_path)
    assert fault in str(error.value)
    assert str(tmp_path) in str(error.value) or "order" in fault
    assert "\n" not in str(error.value)
    assert error.value.__suppress_context__


# What is compared ----------------------------------------------------------------------------------------------------


def halves(arrays, wrong=0.0):
    """Return the label map of `save_labels` at the size of an image; a share of the right half's rows is wrong."""
    height, width = arrays["pixel_values"].shape[2:]
    labels = np.zeros((1, height, width), np.uint8)
    labels[:, int(height * wrong) :, width // 2 :] = 1
    return labels


class Fake:
    """A format whose int8 model is a function."""

    def __init__(self, run):
        self.run = run

    def load(self, folder, settings):
        return self.run


def compared(monkeypatch, folder, run_float, run_int8, others=(), **options):
    settings = ExportSettings(int8=folder, **options)
    monkeypatch.setattr(int8, "format_of", lambda name: Fake(run_int8))
    monkeypatch.setitem(int8.QUANTISERS, "onnx", lambda folder, photos: "by hand")
    return int8.quantize(settings, folder, photos_of(folder), run_float, others)


def test_agreement_and_mean_iou(monkeypatch, tmp_path):
    save_photos(tmp_path / "images", 12)
    save_labels(tmp_path / "labels", 12)
    seen = []

    def run_int8(arrays):
        seen.append(round(float(arrays["pixel_values"].mean() * 255)))
        return {"labels": halves(arrays, wrong=1 / 32)}

    report = compared(monkeypatch, tmp_path, lambda arrays: {"labels": halves(arrays)}, run_int8, accept_int8_loss=True)
    assert seen == [4, 9]
    assert report == {
        "method": "by hand",
        "photos": 12,
        "calibrated_on": 10,
        "judged_on": 2,
        "agreement": 1 - 1 / 64,
        "mean_iou": {"float": 1.0, "int8": pytest.approx((32 / 33 + 31 / 32) / 2)},
    }


def test_logits_are_compared_by_their_labels(monkeypatch, tmp_path):
    """The larger of several classes, and the sign of one; several outputs count together."""

    def outputs(arrays, wrong=0.0):
        right = halves(arrays, wrong).astype(np.float32)
        return {"object": np.stack([-right, right - 0.5], 1), "mask": right[:, None] - 0.5, "scene": np.eye(3)[:1]}

    save_photos(tmp_path)
    report = compared(monkeypatch, tmp_path, outputs, lambda arrays: outputs(arrays, wrong=1 / 32))
    pixels = 2 * (2 * 32 * 48)
    assert report["agreement"] == pytest.approx(1 - pixels / 64 / (pixels + 2))
    assert "mean_iou" not in report


def test_int8_that_differs_is_refused_unless_asked(monkeypatch, tmp_path):
    save_photos(tmp_path)
    runs = [lambda arrays: {"labels": halves(arrays)}, lambda arrays: {"labels": halves(arrays, wrong=1 / 8)}]
    with pytest.raises(
        ProofError, match=r"agree on 93\.75% of the labels of 2 photos, less than 97%.*accept_int8_loss"
    ):
        compared(monkeypatch, tmp_path, *runs)
    assert compared(monkeypatch, tmp_path, *runs, accept_int8_loss=True)["agreement"] == 1 - 1 / 16


def test_int8_that_loses_mean_iou_is_refused_unless_asked(monkeypatch, tmp_path):
    """A rare class is lost, with few pixels."""
    save_photos(tmp_path / "images")
    save_labels(tmp_path / "labels")
    for path in (tmp_path / "labels").iterdir():
        labels = np.zeros((20, 24), np.uint8)
        labels[:1, :6] = 1
        Image.fromarray(labels).save(path)

    def rare(arrays):
        labels = np.zeros((1, 32, 48), np.uint8)
        labels[:, :1, :12] = 1
        return {"labels": labels}

    runs = [rare, lambda arrays: {"labels": np.zeros((1, 32, 48), np.uint8)}]
    with pytest.raises(ProofError, match=r"mean IoU of 0\.49\d on 2 photos, float 0\.\d+: a loss above 0\.02"):
        compared(monkeypatch, tmp_path, *runs)
    assert compared(monkeypatch, tmp_path, *runs, accept_int8_loss=True)["agreement"] > 0.97


def test_label_maps_that_hold_no_class_show_nothing(monkeypatch, tmp_path):
    save_photos(tmp_path / "images")
    save_labels(tmp_path / "labels")
    for path in (tmp_path / "labels").iterdir():
        Image.new("L", (24, 20), 255).save(path)
    runs = [lambda arrays: {"labels": halves(arrays)}] * 2
    with pytest.raises(ProofError, match="mean IoU of nan"):
        compared(monkeypatch, tmp_path, *runs)


def test_int8_runs_at_the_other_sizes_too(monkeypatch, tmp_path):
    save_photos(tmp_path)
    larger = {"pixel_values": np.zeros((2, 3, 65, 97), np.float32)}

    def run_float(arrays):
        return {"labels": np.zeros(arrays["pixel_values"][:, 0].shape, np.uint8)}

    def run_int8(arrays):
        return {"labels": np.zeros((1, 32, 48), np.uint8)}

    with pytest.raises(ProofError, match=r"int8 model's labels is uint8 of shape 1 x 32 x 48.* 2 x 65 x 97"):
        compared(monkeypatch, tmp_path, run_float, run_int8, [larger])
    assert compared(monkeypatch, tmp_path, run_float, run_float, [larger])["agreement"] == 1


def test_what_lies_before_and_after_the_convolutions_stays_float():
    operations = [
        Operation("photo", False, []),
        Operation("bands", False, []),
        Operation("resize", False, ["photo", "bands"]),
        Operation("stem", True, ["resize"]),
        Operation("linear", False, ["stem"]),
        Operation("side", False, ["stem"]),
        Operation("classifier", True, ["linear"]),
        Operation("upsample", False, ["classifier", "bands"]),
    ]
    assert int8._outside(operations) == ["photo", "bands", "resize", "side", "upsample"]


# The libraries -------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Convolutions, a norm, a linear layer, and a resampling by products with matrices."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.linear = nn.Linear(32, 64)
        self.classifier = nn.Conv2d(64, 5, 1)

    def forward(self, pixel_values):
        x = self.norm(self.conv(self.stem(pixel_values).relu())).relu()
        x = self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        logits = self.classifier(x)
        row = torch.arange(logits.shape[2])
        return (row[:, None] == row).float() @ logits


def write_small(form, folder):
    """Write the float model with a name for metadata, any size."""
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(2, 3, 24, 40)
    if form == "onnx":
        axes = {"pixel_values": {0: "batch", 2: "height", 3: "width"}}
        names = {"input_names": ["pixel_values"], "output_names": ["logits"], "dynamic_axes": axes}
        torch.onnx.export(model, (x,), folder / "model.onnx", dynamo=False, **names)
        written = onnx.load(folder / "model.onnx")
        onnx.helper.set_model_props(written, {"class_names": '["sky"]'})
        onnx.save(written, folder / "model.onnx")
    else:
        written = openvino.convert_model(model, example_input=x, input=[-1, 3, -1, -1])
        written.inputs[0].get_tensor().set_names({"pixel_values"})
        written.outputs[0].get_tensor().set_names({"logits"})
        written.set_rt_info("sky", ["model_info", "labels"])
        openvino.save_model(written, folder / "model.xml", compress_to_fp16=False)


def metadata_of(form, folder):
    if form == "onnx":
        return {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
    return core().read_model(folder / "model.xml").get_rt_info(["model_info", "labels"]).astype(str)


def floats(form, folder):
    """Return the sizes of the float weights of a model that are larger than a channel's scale, bias or norm."""
    if form == "onnx":
        tensors = onnx.load(folder / "model.onnx").graph.initializer
        return [list(t.dims) for t in tensors if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 64]
    operations = core().read_model(folder / "model.xml").get_ops()
    constants = [x for x in operations if x.get_type_name() == "Constant" and x.get_element_type().is_real()]
    return [list(x.shape) for x in constants if np.prod(list(x.shape)) > 64]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_a_model_is_quantised(form, monkeypatch, tmp_path):
    folder, settings = tmp_path / "model", ExportSettings(format=form)
    folder.mkdir()
    write_small(form, folder)
    before, files = metadata_of(form, folder), sorted(path.name for path in folder.iterdir())
    run_float = format_of(form).load(folder, settings)
    monkeypatch.setattr(logging.root, "handlers", [])  # a library's warning adds one
    loggers, variables = logging.getLoggerClass(), dict(os.environ)
    report = int8.quantize(settings, folder, photos_of(save_photos(tmp_path / "photos")), run_float)
    assert report["agreement"] > 0.97
    assert (logging.getLoggerClass(), dict(os.environ), logging.root.handlers) == (loggers, variables, [])
    assert sorted(path.name for path in folder.iterdir()) == files
    assert metadata_of(form, folder) == before
    assert floats(form, folder) == []
    run_int8 = format_of(form).load(folder, settings)
    for shape in ((1, 3, 32, 48), (2, 3, 17, 29), (3, 3, 65, 16)):
        arrays = {"pixel_values": np.random.default_rng(0).random(shape, dtype=np.float32) / 25}
        expected, found = (run(arrays)["logits"] for run in (run_float, run_int8))
        assert 0 < np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


# The package's model -------------------------------------------------------------------------------------------------


def save_scenes(folder, seeds):
    """Write scenes and their label maps."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for seed in seeds:
        image, labels = scene(seed)
        image.save(folder / "images" / f"{seed}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{seed}.png")
    return folder


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("form", ["onnx", "openvino"])
@pytest.mark.parametrize("options", [{}, {"labels": True, "with_preprocessing": True}], ids=["logits", "labels"])
def test_the_package_s_model_on_unseen_scenes(form, options, tmp_path):
    """50 scenes that neither trained nor calibrated: nearly the same labels, and the same mean IoU within 0.01."""
    photos = save_scenes(tmp_path / "photos", range(400_000, 400_040))
    for name, more in (("float", {}), ("int8", {"int8": photos})):
        report = export_model(MODEL, tmp_path / name, format=form, **options, **more)
    assert report["int8"]["agreement"] > 0.98
    runs = [format_of(form).load(tmp_path / name, ExportSettings(format=form, **options)) for name in ("float", "int8")]
    _, processor = load_model()
    matrices, equal = [ConfusionMatrix(len(ID2LABEL)) for _ in runs], []
    for image, labels, _ in SceneDataset(range(500_000, 500_050)):
        arrays = {"images": np.asarray(image)[None]} if options else dict(processor(images=image, return_tensors="np"))
        maps = [run(arrays) for run in runs]
        maps = [found["labels"][0] if options else found["logits"][0].argmax(0) for found in maps]
        for matrix, found in zip(matrices, maps, strict=True):
            matrix.update(found, labels)
        equal.append((maps[0] == maps[1]).mean())
    assert np.mean(equal) > 0.98
    assert matrices[0].mean_iou - matrices[1].mean_iou < 0.01
