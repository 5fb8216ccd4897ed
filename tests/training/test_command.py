"""`fastuper train`: from a folder of images to a checkpoint that fastuper and Transformers load."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

from fastuper import UperNetConfig, UperNetForSemanticSegmentation
from fastuper.cli import app
from fastuper.data.classes import ade20k_names
from fastuper.models.upernet_configuration import named_backbone_config
from fastuper.recipes.recipes import BACKBONES
from fastuper.training.start import build_model, open_splits, set_drop_path_rate
from tests.training.common import losses, read_log, tiny_model, tiny_processor, write_data

OPTIONS = [
    "--steps",
    "3",
    "--batch-size",
    "2",
    "--crop",
    "32",
    "--cpu",
    "--log-every",
    "1",
    "--workers",
    "0",
]


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def tiny_backbone(monkeypatch):
    monkeypatch.setitem(BACKBONES, "convnext-tiny", lambda: tiny_model().config.backbone_config)


def fastuper_train(data, output, *options):
    size = () if "--model" in options else ("--hidden-size", "8")
    arguments = ["train", "--data", str(data), "--output", str(output), *OPTIONS, *size, *options]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_backbone")
def test_from_folder_to_checkpoint(data, tmp_path):
    output = tmp_path / "run"
    code, text = fastuper_train(data, output, "--ema", "0.9", "--clip", "1", "--drop-path", "0.2")
    assert code == 0, text
    assert "4 photos to train on, 2 to validate on" in text
    assert f"trained model: {output}/last; best model: {output}/best" in text
    assert len(losses(output)) == 3
    assert any("mIoU" in line for line in read_log(output))
    assert re.search(r"step 2 of 3: loss \d\.\d{4}, .*about \d\d:\d\d left", text), repr(text)
    pixel_values = torch.rand(1, 3, 64, 64)
    for name in ("last", "best"):
        ours = UperNetForSemanticSegmentation.from_pretrained(output / name)
        theirs = transformers.UperNetForSemanticSegmentation.from_pretrained(output / name).eval()
        assert theirs.config.id2label == {0: "sky", 1: "tree", 2: "road"}
        assert ours.config.backbone_config.drop_path_rate == 0.2
        with torch.no_grad():
            torch.testing.assert_close(ours(pixel_values).logits, theirs(pixel_values).logits, rtol=1e-4, atol=1e-5)
    assert transformers.SegformerImageProcessor.from_pretrained(output / "last").size["height"] == 32

    code, text = fastuper_train(data, output, "--ema", "0.9", "--clip", "1", "--drop-path", "0.2")
    assert code == 0, text
    assert "has all 3 steps" in text
    code, text = fastuper_train(data, output, "--lr", "0.5")
    assert code == 2
    assert "clip was 1.0 and is now None, ema was 0.9 and is now None, learning_rate was 0.0001 and is now 0.5" in text
    assert "or --restart (restart=True) to remove it" in text
    code, text = fastuper_train(data, output, "--lr", "0.5", "--restart")
    assert code == 0, text
    assert len(losses(output)) == 3


def test_from_a_checkpoint_of_other_classes(data, tmp_path):
    start = tmp_path / "start"
    model = tiny_model()
    model.save_pretrained(start)
    tiny_processor().save_pretrained(start)
    (data / "classes.txt").unlink()
    for path in (data / "labels" / "training").iterdir():
        label = np.asarray(Image.open(path)).copy()
        label[-1, -1] = 4
        Image.fromarray(label).save(path)
    options = ["--model", str(start), "--lr", "1e-30", "--gradient-checkpointing"]
    code, text = fastuper_train(data, tmp_path / "run", *options)
    assert code == 0, text
    assert "the data names no classes: numbering 5" in text
    assert f"{start} has 3 classes and the data 5: the classifiers are reinitialised" in text
    saved = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "run" / "last")
    assert saved.config.num_labels == 5
    weight = "backbone.encoder.stages.0.layers.0.pwconv1.weight"
    torch.testing.assert_close(saved.state_dict()[weight], model.state_dict()[weight])


def test_classes_without_names_get_the_names_of_the_model(data, tmp_path):
    start = tmp_path / "start"
    tiny_model().save_pretrained(start)
    tiny_processor().save_pretrained(start)
    (data / "classes.txt").unlink()
    code, text = fastuper_train(data, tmp_path / "run", "--model", str(start))
    assert code == 0, text
    assert f"the data names no classes: using the names of {start}" in text
    saved = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "run" / "last")
    assert saved.config.id2label == {0: "sky", 1: "tree", 2: "road"}


@pytest.mark.usefixtures("tiny_backbone")
def test_ade20k(data, tmp_path):
    """ADE20K's label 0 is ignored, and label 1 is class 0."""
    root = tmp_path / "ade"
    for split in ("training", "validation"):
        for path in (data / "images" / split).iterdir():
            image, label = (np.asarray(Image.open(data / kind / split / path.name)) for kind in ("images", "labels"))
            for kind in ("images", "annotations"):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / "images" / split / path.with_suffix(".jpg").name)
            annotation = np.where(label == 255, 0, label + 1).astype(np.uint8)
            Image.fromarray(annotation).save(root / "annotations" / split / path.name)
    code, text = fastuper_train(root, tmp_path / "run")
    assert code == 0, text
    assert "4 photos to train on, 2 to validate on" in text
    saved = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "run" / "best")
    assert saved.config.id2label == dict(enumerate(ade20k_names()))
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.usefixtures("tiny_backbone")
def test_cityscapes(data, tmp_path):
    root = tmp_path / "cityscapes"
    for split, name in (("training", "train"), ("validation", "val")):
        for path in (data / "images" / split).iterdir():
            image, label = (np.asarray(Image.open(data / kind / split / path.name)) for kind in ("images", "labels"))
            for kind, ending, array in (
                ("leftImg8bit", "leftImg8bit", image),
                (
                    "gtFine",
                    "gtFine_labelIds",
                    np.where(label == 255, 0, label + 23),
                ),  # 0 is no class
            ):
                folder = root / kind / name / "ulm"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(folder / f"ulm_{path.stem}_000019_{ending}.png")
    code, text = fastuper_train(root, tmp_path / "run")
    assert code == 0, text
    assert "4 photos to train on, 2 to validate on" in text
    saved = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "run" / "best")
    assert (saved.config.num_labels, saved.config.id2label[10]) == (19, "sky")
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.usefixtures("tiny_backbone")
def test_images_of_other_names_make_another_run(data, tmp_path):
    code, text = fastuper_train(data, tmp_path / "run")
    assert code == 0, text
    moved = data.rename(tmp_path / "moved")
    code, text = fastuper_train(moved, tmp_path / "run")
    assert code == 0, text
    assert "has all 3 steps" in text
    for kind in ("images", "labels"):
        (moved / kind / "training" / "0.png").rename(moved / kind / "training" / "9.png")
    code, text = fastuper_train(moved, tmp_path / "run")
    assert code == 2
    assert "holds another run" in text
    assert "images' names was" in text


@pytest.mark.parametrize("names", ["road sky tree", "sky tree road", "cat dog fox"])
def test_checkpoint_with_other_class_names(names, data, tmp_path):
    start = tmp_path / "start"
    tiny_model().save_pretrained(start)
    (data / "classes.txt").write_text(names.replace(" ", "\n"))
    code, text = fastuper_train(data, tmp_path / "run", "--model", str(start))
    moved = names.startswith("road")
    assert code == (2 if moved else 0), text
    assert ("the dataset's classes are the model's in another order (class 0 is road" in text) is moved
    assert (f"the data and {start} have different class names" in text) is names.startswith("cat")


@pytest.mark.parametrize("saved", [True, False], ids=["of a checkpoint", "by name"])
def test_stochastic_depth_of_other_libraries_backbones(saved, tmp_path):
    backbone = transformers.ConvNextV2Config(drop_path_rate=0.1)
    backbone.save_pretrained(tmp_path)
    config = UperNetConfig(backbone) if saved else UperNetConfig(backbone=str(tmp_path))
    set_drop_path_rate(config, 0.25)
    found = config.backbone_config if saved else named_backbone_config(config)
    assert found.to_dict()["drop_path_rate"] == 0.25
    timm = UperNetConfig(backbone="resnet18", use_timm_backbone=True)
    set_drop_path_rate(timm, 0.25)
    assert named_backbone_config(timm).to_dict()["drop_path_rate"] == 0.25
    without = UperNetConfig({"model_type": "hgnet_v2"})
    with pytest.raises(ValueError, match="a hgnet_v2 has no drop_path_rate; leave out --drop-path"):
        set_drop_path_rate(without, 0.25)


@pytest.mark.usefixtures("tiny_backbone")
def test_folder_with_a_training_split_alone(data, tmp_path):
    for kind in ("images", "labels"):
        shutil.rmtree(data / kind / "validation")
    code, text = fastuper_train(data, tmp_path / "run")
    assert code == 0, text
    assert "has no split validation: training without validation" in text
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.usefixtures("tiny_backbone")
def test_data_of_one_class_is_refused(data, tmp_path):
    (data / "classes.txt").write_text("road")
    code, text = fastuper_train(data, tmp_path / "run")
    assert code == 2
    assert "names one class, road, and every pixel would be in it; name a second class in classes.txt" in text


@pytest.mark.usefixtures("tiny_backbone")
def test_folder_without_splits(data, tmp_path):
    for kind in ("images", "labels"):
        for path in [*(data / kind).glob("*/*")]:
            path.rename(data / kind / path.name)
        for split in ("training", "validation"):
            (data / kind / split).rmdir()
    code, text = fastuper_train(data, tmp_path / "run")
    assert code == 0, text
    assert "has no splits: training on all photos, without validation" in text
    assert (tmp_path / "run" / "last").is_dir()
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.usefixtures("tiny_backbone")
def test_faults_before_training_are_one_line(data, tmp_path):
    for options, message in (
        (["--backbone", str(tmp_path)], "has no config.json"),
        (["--model", str(tmp_path / "nowhere")], "neither a folder here nor"),
        (["--batch-size", "3", "--accumulate", "2"], "batch_size=3 must be a multiple of 1 processes x accumulate=2"),
        (["--validation-split", "holdout"], "has no split holdout; it has training, validation"),
        (
            ["--backbone", "resnet-18", "--drop-path", "0.1"],
            "a resnet has no drop_path_rate; leave out --drop-path",
        ),
        (["--model", "a", "--backbone", "swin-tiny"], "--backbone is for a new UPerNet, and --model has its own"),
        (["--model", "a", "--hidden-size", "8"], "--hidden-size is for a new UPerNet, and --model has its own"),
        (["--ema", "2"], "ema must be more than 0 and at most 1"),
    ):
        code, text = fastuper_train(data, tmp_path / "run", *options)
        assert code == 2, text
        assert message in text.splitlines()[-1], text
        assert not (tmp_path / "run").exists()
    (data / "images" / "training" / "0.png").unlink()
    code, text = fastuper_train(data, tmp_path / "run")
    assert code == 2
    assert "1 of 4 label maps have no photo of the same name" in text


@pytest.mark.usefixtures("tiny_backbone")
def test_faults_during_training_are_one_line(data, tmp_path):
    (data / "images" / "training" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, text = fastuper_train(data, tmp_path / "run")
    assert code == 1
    assert text.splitlines()[-1].startswith("fastuper: ")
    assert "2.png: " in text.splitlines()[-1]


@pytest.mark.usefixtures("tiny_backbone")
@pytest.mark.parametrize("names", ["", "background\nobject"], ids=["without names", "with names"])
@pytest.mark.parametrize(
    ("values", "message", "named"),
    [
        (
            (0, 255),
            "0 or ignored (255); if 255 is a class, as in masks of 0 and",
            "renumber it to 1",
        ),
        (
            (1, 255),
            "1 or ignored (255); if 255 is a class, as in masks of 0 and",
            "renumber it to 0",
        ),
        ((0, 0), "all labels of the 6 label maps are 0; add label maps with", "4 label maps are 0 (background); add"),
        ((255, 255), "all pixels of the 6 label maps are ignored (label 255)", "all pixels of the 4 label maps"),
        (
            (0, 128),
            "the labels 0, 128 only, so that most of the classes 0 to",
            "holds the label 128, but",
        ),
        ((0, 65535), "the labels 0, 65535 only, so that most of", "holds the label 65535, but there are 2 classes"),
    ],
)
def test_masks_that_are_not_numbered_are_refused(values, message, named, names, data, tmp_path):
    (data / "classes.txt").unlink()
    if names:
        (data / "classes.txt").write_text(names)
    for path in (data / "labels").glob("*/*.png"):
        label = np.where(np.asarray(Image.open(path)) == 1, values[1], values[0])
        Image.fromarray(label.astype(np.uint16 if values[1] > 255 else np.uint8)).save(path)
    code, text = fastuper_train(data, tmp_path / "run")
    assert code == 2
    last = [line for line in text.splitlines() if line.startswith("fastuper: ")]
    assert len(last) == 1
    assert (named if names else message) in last[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--data", "--output", "--model", "--backbone"])
def test_empty_names_are_refused(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = fastuper_train("data", "run", option, "")
    assert code == 2
    assert re.search(f"{option}.*: it is empty; is a variable unset", text)
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("tiny_backbone")
def test_data_that_has_few_objects_or_a_rare_class_is_trained_on(data, tmp_path):
    """Most label maps have background and border only, as in many datasets of one kind of object."""
    for path in (data / "labels").glob("*/*.png"):
        label = np.asarray(Image.open(path)) == 255
        Image.fromarray((label * 255).astype(np.uint8)).save(path)
    label[0, 0] = True
    Image.fromarray(np.where(label, 255, 0).astype(np.uint8)).save(path)
    rare = data / "labels" / "training" / "3.png"
    label = np.asarray(Image.open(rare)).copy()
    label[-1, -1] = 1
    Image.fromarray(label).save(rare)
    code, text = fastuper_train(data, tmp_path / "run")
    assert code == 0, text
    # There is no terminal, so that there are lines and no progress bar.
    assert re.findall(r"^step (\d) of 3: loss \d\.\d{4}, lr \d\.\d\de-\d\d", text, re.MULTILINE) == ["1", "2", "3"]
    assert "\r" not in text
    assert "class 2 (road) is in none of the label maps, and pixels of label 255 are ignored" in text


@pytest.mark.usefixtures("tiny_backbone")
def test_gaps_between_labels_without_names_are_named(data, tmp_path):
    (data / "classes.txt").unlink()
    for path in (data / "labels").glob("*/*.png"):
        label = np.asarray(Image.open(path)).copy()
        label[label == 2] = 3
        Image.fromarray(label).save(path)
    code, text = fastuper_train(data, tmp_path / "run")
    assert code == 0, text
    assert "no label map holds 2, which becomes a class too" in text


@pytest.mark.usefixtures("tiny_backbone")
def test_unreadable_data_is_refused_before_training(data, tmp_path):
    (data / "images" / "training" / "9.png").symlink_to("nowhere")
    (data / "labels" / "training" / "9.png").touch()
    code, text = fastuper_train(data, tmp_path / "run")
    assert code == 2
    assert "1 file or folder cannot be read: " in text
    assert "9.png: is a link to nowhere, which does not exist; mend it" in text.replace("\n", "")
    assert not (tmp_path / "run").exists()


def test_model_of_one_class_stays_one(tmp_path):
    config = tiny_model().config
    config.id2label = {0: "road"}
    UperNetForSemanticSegmentation(config).save_pretrained(tmp_path)
    names = {0: "background", 1: "tree"}
    model, _ = build_model(names, model=str(tmp_path), image_size=32)
    assert model.config.id2label == {0: "tree"}


def test_split_of_any_name(data):
    for kind in ("images", "labels"):
        for split, name in (("training", "north"), ("validation", "south")):
            (data / kind / split).rename(data / kind / name)
    training, validation = open_splits(data, "auto", "north", "south")
    assert (len(training), len(validation)) == (4, 2)
    training, validation = open_splits(data, "auto", "north")
    assert (len(training), validation) == (4, None)
    for splits in (("west", None), ("north", "west"), (None, "south")):
        with pytest.raises(ValueError, match="has no splits, so no"):
            open_splits(data, "auto", *splits)
