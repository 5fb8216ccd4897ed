"""The training loop in one process: steps beside PyTorch's, resumed runs, and faults that stop it."""

from __future__ import annotations

import copy
import json
import math
import sys

import accelerate
import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from torch.nn import functional as F

import fastuper.training.trainer
from fastuper import ConvNextConfig, UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.data.augment import TrainingDataset, TrainingTransform
from fastuper.data.samples import DataError, Sample
from fastuper.recipes.recipes import RECIPES, parameter_groups
from fastuper.training.batches import StepSampler
from fastuper.training.config import TrainingConfig, TrainingError
from tests.training.common import (
    Photos,
    flip_transform,
    losses,
    read_log,
    tiny_model,
    tiny_processor,
    train,
)


def interrupt(monkeypatch, step: int) -> None:
    """Make the trainer stop after a number of steps, in the middle of the next step."""
    loss = fastuper.training.trainer.Trainer._loss

    def stop(trainer, *arguments):
        if trainer.step == step:
            raise KeyboardInterrupt
        return loss(trainer, *arguments)

    monkeypatch.setattr(fastuper.training.trainer.Trainer, "_loss", stop)


# Order of images


def keys(**options) -> list[list[tuple[int, int]]]:
    return list(StepSampler(**{"length": 5, "batch_size": 4, "seed": 7, "steps": 10, **options}))


def test_every_epoch_has_every_image_once():
    flat = [key for batch in keys() for key in batch]
    assert len(flat) == 40
    for epoch in range(8):
        assert sorted(index for at, index in flat if at == epoch) == list(range(5))
    assert [epoch for epoch, _ in flat] == sorted(epoch for epoch, _ in flat)


def test_order_changes_with_epoch_and_seed_only():
    flat = [key for batch in keys() for key in batch]
    orders = {tuple(index for at, index in flat if at == epoch) for epoch in range(8)}
    assert len(orders) > 4
    assert keys() == keys()
    assert keys() != keys(seed=8)


def test_order_resumes_at_any_step():
    for start in (1, 4, 9):
        assert keys(start=start) == keys()[start:]


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_processes_and_pieces_share_the_images_of_a_step(world_size, accumulate):
    ranks = [keys(rank=rank, world_size=world_size, accumulate=accumulate) for rank in range(world_size)]
    for step, whole in enumerate(keys()):
        pieces = [batch for rank in ranks for batch in rank[step * accumulate : (step + 1) * accumulate]]
        assert len({len(piece) for piece in pieces}) == 1
        assert sorted(key for piece in pieces for key in piece) == sorted(whole)


def test_length_counts_batches():
    sampler = StepSampler(5, 4, 0, steps=10, start=3, world_size=2, accumulate=2)
    assert len(sampler) == len(list(sampler)) == 14


# The steps


def images_of(photos: Photos, steps: int):
    """Yield the batches of the steps, as tensors."""
    data = TrainingDataset(photos, flip_transform, 0)
    for batch in StepSampler(len(photos), 4, 0, steps):
        items = [data[key] for key in batch]
        yield torch.stack([item["pixel_values"] for item in items]), torch.stack([item["labels"] for item in items])


def reference_losses(model, steps: int, *, clip: float, ema: float):
    """Return the losses of AdamW on Transformers' model in float64, and the averaged weights."""
    theirs = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig.from_dict(json.loads(model.config.to_json_string()))
    )
    theirs.load_state_dict(model.state_dict())
    theirs.double().train()
    groups = parameter_groups(theirs, RECIPES["convnext"])
    for group in groups:
        group["lr"] *= 1e-2 / 1e-4
    optimizer = torch.optim.AdamW(groups, foreach=False)
    rates = [group["lr"] for group in groups]
    found, average = [], None
    for step, (pixel_values, labels) in enumerate(images_of(Photos(6), steps)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        loss = theirs(pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        optimizer.step()
        found.append(loss.item())
        state = theirs.state_dict()
        if average is None:
            average = copy.deepcopy(state)
        for name, value in average.items():
            value.copy_(ema * value + (1 - ema) * state[name] if value.is_floating_point() else state[name])
    return found, average


def test_losses_are_those_of_transformers_model_and_torchs_adamw(tmp_path):
    model = tiny_model()
    expected, average = reference_losses(model, 4, clip=0.5, ema=0.8)
    train(tmp_path, model=copy.deepcopy(model), double=True, steps=4, clip=0.5, ema=0.8)
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-9)
    saved = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "last").state_dict()
    for name, value in average.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-6, atol=1e-8)


def test_pieces_give_the_losses_of_the_whole_batch(tmp_path):
    """The pieces have different numbers of ignored pixels, so that the mean of their means is another loss."""
    options = {"double": True, "freeze_norm": True, "clip": 0.5, "steps": 3}
    train(tmp_path / "whole", **options)
    train(tmp_path / "pieces", accumulate=4, **options)
    assert losses(tmp_path / "pieces") == pytest.approx(losses(tmp_path / "whole"), rel=1e-10)


def test_frozen_norms_keep_their_statistics(tmp_path):
    trainer = train(tmp_path, freeze_norm=True, validation=Photos(1), validate_every=1, steps=2)
    before = tiny_model().state_dict()
    after = trainer.model.state_dict()
    norms = [name for name in after if "running_" in name or "num_batches" in name]
    assert norms
    assert all(torch.equal(after[name], before[name]) for name in norms)
    assert not torch.equal(after["decode_head.classifier.weight"], before["decode_head.classifier.weight"])


def test_bfloat16_computes_in_it_and_keeps_float32(tmp_path):
    train(tmp_path / "whole", steps=2)
    trainer = train(tmp_path / "half", bf16=True, steps=2)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert losses(tmp_path / "half") != losses(tmp_path / "whole")
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "whole"), rel=0.05)


def test_a_step_of_ignored_pixels_alone_changes_nothing_but_decay(tmp_path):
    class Ignored(Photos):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample._replace(label=np.full_like(sample.label, 255))

    trainer = train(tmp_path, data=Ignored(3), weight_decay=0.0, steps=2)
    assert losses(tmp_path) == [0, 0]
    before = tiny_model().state_dict()
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_one_class_trains_with_binary_cross_entropy(tmp_path):
    class Binary(Photos):
        id2label = {0: "background", 1: "road"}  # noqa: RUF012

        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample._replace(label=np.where(sample.label == 2, 0, sample.label))

    config = tiny_model().config
    config.id2label = {0: "road"}
    torch.manual_seed(0)
    model = UperNetForSemanticSegmentation(config)
    pixel_values, labels = next(images_of(Binary(6), 1))
    with torch.no_grad():
        model.double().train()
        maps = model.backbone(pixel_values).feature_maps
        heads = [(model.decode_head(maps), 1.0), (model.auxiliary_head(maps), config.auxiliary_loss_weight)]
    trainer = train(tmp_path, model=model, data=Binary(6), double=True, steps=1, validation=Binary(2))
    valid = labels != 255
    expected = 0.0
    for coarse, weight in heads:
        logits = F.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)[:, 0]
        expected += weight * F.binary_cross_entropy_with_logits(logits[valid], labels[valid].double()).item()
    assert losses(tmp_path) == [pytest.approx(expected, rel=1e-9)]
    assert 0 <= trainer.best["mIoU"] <= 1


# Interrupted and resumed


@pytest.mark.parametrize("step", [1, 3])
def test_interrupted_run_equals_an_uninterrupted_run(step, tmp_path, monkeypatch):
    options = {"ema": 0.9, "save_every": 2, "validate_every": 3, "steps": 5, "batch_size": 2}
    whole = train(tmp_path / "whole", model=tiny_model(0.5), validation=Photos(2, seed=1), **options)
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", model=tiny_model(0.5), validation=Photos(2, seed=1), **options)
    torch.rand(100)  # draws between the two runs change nothing
    data = Photos(6)
    parts = train(tmp_path / "parts", model=tiny_model(0.5), data=data, validation=Photos(2, seed=1), **options)
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")
    assert parts.best == whole.best
    for name, value in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], value), name
    for name, value in whole.saved_model.state_dict().items():
        assert torch.equal(parts.saved_model.state_dict()[name], value), name
    # Images of the steps before the checkpoint are not read again.
    assert len(data.read) == (5 - (3 if step == 3 else 0)) * 2


def test_the_same_trainer_resumes_after_an_interruption(tmp_path, monkeypatch):
    """The interruption comes in the middle of a step, after some of its gradients."""
    options = {"steps": 4, "batch_size": 4, "accumulate": 2, "freeze_norm": True}
    train(tmp_path / "whole", **options)
    loss, trainers, calls = fastuper.training.trainer.Trainer._loss, [], []

    def stop(trainer, *arguments):
        calls.append(trainers.append(trainer))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fastuper.training.trainer.Trainer, "_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", **options)
    assert trainers[0].step == 2
    trainers[0].train()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_another_loop_that_accumulates_gradients_stops_no_step(tmp_path):
    alone = train(tmp_path / "alone", steps=2)
    state = alone.accelerator.gradient_state
    state._set_sync_gradients(False)
    try:
        train(tmp_path / "beside", steps=2)
    finally:
        state._set_sync_gradients(True)
    assert losses(tmp_path / "beside") == losses(tmp_path / "alone")
    assert losses(tmp_path / "alone")[0] != losses(tmp_path / "alone")[1]


def test_validation_that_was_not_finished_is_logged_once(tmp_path, monkeypatch):
    options = {"steps": 3, "validate_every": 2, "validation": Photos(2, seed=1)}
    train(tmp_path / "whole", **options)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fastuper.training.trainer.RunFolder, "write_validation", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", **options)
    assert "mIoU" in read_log(tmp_path / "parts")[-1]
    train(tmp_path / "parts", **options)
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")


def test_stochastic_depth_draws_differently_at_each_step(tmp_path):
    """Without it the tests of resumed runs would show nothing: at rate 0 all losses of one image are equal."""
    options = {"data": Photos(1), "batch_size": 1, "freeze_norm": True, "steps": 3, "transform": still}
    train(tmp_path / "still", model=tiny_model(0.0), learning_rate=1e-30, **options)
    assert len(set(losses(tmp_path / "still"))) == 1
    train(tmp_path / "moving", model=tiny_model(0.9), learning_rate=1e-30, **options)
    assert len(set(losses(tmp_path / "moving"))) > 1


def still(sample, generator):
    item = flip_transform(sample, np.random.default_rng(0))
    return {**item, "pixel_values": item["pixel_values"].float()}


def test_finished_run_does_no_more(tmp_path, capsys):
    trainer = train(tmp_path, steps=2)
    assert isinstance(trainer.train_data.transform, TrainingTransform)
    assert trainer.train_data.transform.crop_size == (32, 32)
    before = (tmp_path / "log.jsonl").read_text()
    train(tmp_path, steps=2)
    assert (tmp_path / "log.jsonl").read_text() == before
    assert "has all 2 steps" in capsys.readouterr().out


def test_another_configuration_is_refused_and_named(tmp_path):
    train(tmp_path, steps=2)
    with pytest.raises(TrainingError, match=r"learning_rate was 0\.01 and is now 0\.02, steps was 2 and is now 3$"):
        train(tmp_path, steps=3, learning_rate=0.02)
    with pytest.raises(TrainingError, match="images was 6 and is now 5"):
        train(tmp_path, steps=2, data=Photos(5))
    other = tiny_model()
    other.config.id2label = {0: "sky", 1: "tree", 2: "sea"}
    with pytest.raises(TrainingError, match=r"model\.id2label was"):
        train(tmp_path, steps=2, model=other)
    train(tmp_path, steps=2, accumulate=2, workers=1, save_every=1)  # these decide no loss
    train(tmp_path, steps=3, learning_rate=0.02, restart=True)
    assert len(losses(tmp_path)) == 3


# Results of a run


def test_checkpoints_are_read_by_both_libraries(tmp_path):
    trainer = train(tmp_path, validation=Photos(3, seed=1), validate_every=1, steps=3, ema=0.5)
    pixel_values = torch.rand(1, 3, 40, 50)
    for name in ("last", "best"):
        ours = UperNetForSemanticSegmentation.from_pretrained(tmp_path / name)
        theirs = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path / name).eval()
        assert theirs.config.id2label == ours.config.id2label == {0: "sky", 1: "tree", 2: "road"}
        with torch.no_grad():
            torch.testing.assert_close(ours(pixel_values).logits, theirs(pixel_values).logits, rtol=1e-4, atol=1e-5)
        assert UperNetImageProcessor.from_pretrained(tmp_path / name).to_dict() == tiny_processor().to_dict()
    averaged = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "last").state_dict()
    weight = "decode_head.classifier.weight"
    assert torch.equal(averaged[weight], trainer.saved_model.state_dict()[weight])
    assert not torch.equal(averaged[weight], trainer.model.state_dict()[weight])


def test_best_is_the_best_validation(tmp_path):
    trainer = train(tmp_path, validation=Photos(3, seed=1), validate_every=1, steps=5)
    scores = {line["step"]: line["mIoU"] for line in read_log(tmp_path) if "mIoU" in line}
    assert sorted(scores) == list(range(1, 6))
    assert trainer.best["mIoU"] == max(scores.values())
    assert trainer.best["step"] == min(step for step, score in scores.items() if score == max(scores.values()))
    assert (tmp_path / "best").resolve().name == f"step-{trainer.best['step']:09d}"


def test_validation_is_the_arithmetic_of_numpy(tmp_path):
    data = Photos(3, seed=1)
    trainer = train(tmp_path, validation=data, steps=2, validate_every=2)
    theirs = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path / "last").eval()
    processor = transformers.SegformerImageProcessor.from_pretrained(tmp_path / "last")
    counts = np.zeros((3, 3))
    for index in range(3):
        image, label, _ = data[index]
        with torch.no_grad():
            outputs = theirs(**processor(image, return_tensors="pt"))
        predicted = processor.post_process_semantic_segmentation(outputs, [label.shape])[0].numpy()
        for true, found in zip(label.ravel(), predicted.ravel(), strict=True):
            if true != 255:
                counts[true, found] += 1
    iou = np.diag(counts) / (counts.sum(0) + counts.sum(1) - np.diag(counts))
    assert trainer.best["mIoU"] == pytest.approx(iou.mean(), abs=1e-3)


def test_tensorboard_has_the_curves_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, validation=Photos(3, seed=1), steps=4, validate_every=2, pictures=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert curve == [(step + 1, pytest.approx(loss)) for step, loss in enumerate(losses(tmp_path))]
    assert {"train/lr", "train/images_per_second", "val/mIoU", "val IoU/sky"} <= set(events.Tags()["scalars"])
    assert len(events.Tags()["images"]) == 2
    assert [event.step for event in events.Images(events.Tags()["images"][0])] == [2, 4]


# Faults that stop it


class Poisoned(Photos):
    """Photos of which `poison` gives one an infinite pixel, and so a loss of NaN."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample._replace(name="poisoned.png") if index == 4 else sample


def poison(sample, generator):
    item = still(sample, generator)
    if sample.name == "poisoned.png":
        item["pixel_values"][0, 3, 3] = math.inf
    return item


def test_nan_stops_and_names_step_and_files(tmp_path):
    order = [index for batch in StepSampler(6, 2, 0, 9) for _, index in batch]
    step = order.index(4) // 2 + 1
    assert step > 1
    options = {"data": Poisoned(6), "transform": poison, "batch_size": 2, "steps": 9, "save_every": 1}
    with pytest.raises(TrainingError) as error:
        train(tmp_path, **options)
    names = [f"photo{i}.png" if i != 4 else "poisoned.png" for i in order[2 * step - 2 : 2 * step]]
    assert f"the loss of step {step} is nan; the step's images: {', '.join(names)}. " in str(error.value)
    assert f"The checkpoint of step {step - 1} is intact" in str(error.value)
    assert "\n" not in str(error.value)
    saved = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "last")
    assert all(value.isfinite().all() for value in saved.state_dict().values())
    assert len(losses(tmp_path)) == step - 1
    with pytest.raises(TrainingError, match=f"the loss of step {step} is nan"):  # from the checkpoint too
        train(tmp_path, **options)


def test_nan_that_is_found_later_is_named_too(tmp_path, monkeypatch):
    """On a GPU losses are checked when they are logged: here two steps after the first NaN."""
    monkeypatch.setattr(fastuper.training.trainer, "_checks_every_step", lambda device: False)
    order = [index for batch in StepSampler(6, 2, 1, 9) for _, index in batch]
    assert order.index(4) in (2, 3)
    names = ", ".join(f"photo{i}.png" if i != 4 else "poisoned.png" for i in order[2:4])
    options = {"data": Poisoned(6), "transform": poison, "batch_size": 2, "steps": 9, "seed": 1}
    with pytest.raises(TrainingError, match=rf"the loss of step 2 is nan; the step's images: {names}\. There is no"):
        train(tmp_path, save_every=6, log_every=4, **options)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["backbone.embeddings.patch_embeddings.weight", "decode_head.bottleneck.batch_norm.running_var"]
)
def test_weights_that_are_not_finite_are_never_saved(name, tmp_path, monkeypatch):
    """At a finite loss gradients may be infinite, and the statistics of a norm may overflow."""
    step, model = torch.optim.AdamW.step, tiny_model()

    def overflow(optimizer, *arguments, **keywords):
        step(optimizer, *arguments, **keywords)
        if overflow.calls == 3:
            model.state_dict()[name].fill_(math.nan)
        overflow.calls += 1

    overflow.calls = 0
    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(
        TrainingError, match=rf"{name} is NaN or infinite after step 4, whose loss was not; the step's images: photo"
    ):
        train(tmp_path, model=model, steps=4, save_every=2)
    saved = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "last")
    assert all(value.isfinite().all() for value in saved.state_dict().values())


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a file's size")
@pytest.mark.parametrize("kilobytes", [8, 96], ids=["weights", "state"])
def test_full_disk_keeps_the_older_checkpoint(kilobytes, tmp_path, monkeypatch):
    """The system ends writes at a limit of the file size, in the middle of a file."""
    import resource

    write = fastuper.training.trainer.Trainer._write
    run, folders, written = tmp_path / "run", [], []

    def limited(trainer, folder):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if trainer.step == 4:
            folders.append(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, limits[1]))
        try:
            write(trainer, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            written.append(sorted(path.name for path in folder.iterdir()))

    with monkeypatch.context() as patch:
        patch.setattr(fastuper.training.trainer.Trainer, "_write", limited)
        with pytest.raises(TrainingError) as raised:
            train(run, steps=4, save_every=2)
    message = str(raised.value)
    assert message.startswith(f"the checkpoint of step 4 could not be written to {run}: ")
    assert "The checkpoint of step 2 is intact" in message
    assert "\n" not in message
    assert not folders[0].exists()
    assert ("training_state.pt" in written[1]) is (kilobytes == 96)  # the weights, 48 kB, are written before it
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000002"]
    train(run, steps=4, save_every=2)  # with space on the disk the run resumes
    train(tmp_path / "whole", steps=4, save_every=2)
    assert read_log(run) == read_log(tmp_path / "whole")


class Unreadable(Photos):
    def __getitem__(self, index):
        if index == 2:
            raise DataError("broken.png: the file is truncated")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named_in_one_line(workers, tmp_path):
    with pytest.raises(TrainingError, match=r"^Unreadable\[2\]: broken|^broken\.png: the file is truncated$"):
        train(tmp_path, data=Unreadable(6), workers=workers)


class FourChannels(Photos):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample._replace(image=np.concatenate([sample.image, sample.image[..., :1]], axis=2))


def test_image_that_cannot_be_augmented_is_named_in_one_line(tmp_path):
    with pytest.raises(TrainingError, match=r"^image \d of the training data: .*size of tensor"):
        train(tmp_path, data=FourChannels(6))


def test_label_beyond_the_classes_is_named(tmp_path):
    class Beyond(Photos):
        id2label = None

        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample._replace(label=sample.label + (sample.label < 3) * 7)

    message = r"photo\d\.png: label [789] is neither one of the model's 3 classes nor the ignored label 255"
    with pytest.raises(TrainingError, match=message):
        train(tmp_path, data=Beyond(6))


def test_data_that_does_not_fit_the_model_is_refused(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="the training data has no images"):
        train(run, data=Photos(0))
    with pytest.raises(ValueError, match="the validation data has no images"):
        train(tmp_path, validation=Photos(0))
    with pytest.raises(ValueError, match="batch_size=4 must be a multiple of 1 processes x accumulate=3"):
        train(tmp_path, accumulate=3)
    more = Photos(2)
    more.id2label = dict(enumerate("abcd"))
    with pytest.raises(ValueError, match=r"the dataset has 4 classes .*, the model 3 classes"):
        train(tmp_path, data=more)
    other = Photos(2)
    other.ignore_index = 254
    with pytest.raises(ValueError, match="the training data ignores label 254, the model loss_ignore_index=255"):
        train(tmp_path, data=other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"workers": -1}, "workers must be a whole number of at least 0"),
        ({"learning_rate": math.nan}, "learning_rate must be more than 0, got nan"),
        ({"clip": 0.0}, "clip must be more than 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"ema": 1.5}, "ema must be more than 0 and at most 1"),
        ({"steps": 100, "warmup_steps": 100}, "warmup_steps=100 must be fewer than the 100 steps"),
        ({"recipe": "sgd"}, "recipe='sgd' is not known"),
    ],
)
def test_impossible_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)


def test_recipes_decide_options_that_are_none():
    plan = TrainingConfig().plan(ConvNextConfig())
    assert (plan.recipe, plan.warmup_steps) == (RECIPES["convnext"], 1500)
    assert (plan.validate_every, plan.save_every) == (16000, 16000)
    plan = TrainingConfig(steps=100, recipe="swin", learning_rate=1.0, validate_every=7).plan(ConvNextConfig())
    assert (plan.recipe.learning_rate, plan.recipe.weight_decay, plan.recipe.layer_decay) == (1.0, 0.01, 1.0)
    assert (plan.warmup_steps, plan.validate_every, plan.save_every) == (10, 7, 7)


@pytest.mark.parametrize("where", ["log", "events"])
def test_disk_that_is_full_when_losses_are_logged(where, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    target, name = (
        (fastuper.training.trainer.RunFolder, "write_log") if where == "log" else (SummaryWriter, "add_scalar")
    )
    options = {"steps": 3, "save_every": 1}
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, **options)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, full)
        patch.setattr(SummaryWriter, "close", full)  # its buffer cannot be written either
        with pytest.raises(TrainingError) as raised:
            train(tmp_path, **options)
    assert f"the losses up to step 2 could not be logged in {tmp_path}: " in str(raised.value)
    assert "No space left on device. The checkpoint of step 1 is intact" in str(raised.value)
    train(tmp_path, **options)
    assert len(losses(tmp_path)) == 3


class Masks(Photos):
    """The sky is 0, and everything else 255."""

    def __getitem__(self, index: int):
        image, label, name = super().__getitem__(index)
        return Sample(image, np.where(label == 0, 0, 255), name)


def test_masks_of_0_and_255_are_reported_after_an_epoch(tmp_path, capsys):
    train(tmp_path / "masks", data=Masks(6), steps=3)
    message = "all labels of the first 8 training images are 0 (sky) or ignored (255); if 255 is a class"
    assert capsys.readouterr().out.count(message) == 1
    train(tmp_path / "photos", data=Photos(6), steps=3)
    assert "all labels" not in capsys.readouterr().out


class Ignored(Photos):
    def __getitem__(self, index: int):
        image, label, name = super().__getitem__(index)
        return Sample(image, np.full_like(label, 255), name)


def test_validation_without_a_pixel_that_counts(tmp_path):
    message = "validation of step 1 failed: all pixels of the validation data are ignored .label 255.. The checkpoint"
    with pytest.raises(TrainingError, match=message):
        train(tmp_path, steps=2, validation=Ignored(2))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_other_kinds_of_parallelism_are_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", accelerate.DistributedType(kind))
    message = f"Accelerate is configured for {kind}, and training here is data parallel only"
    with pytest.raises(ValueError, match=message):
        train(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_missing_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"training needs tensorboard: pip install 'fastuper\[train\]'"):
        train(tmp_path)


def test_failed_validation_loses_no_step(tmp_path):
    options = {"steps": 2, "validate_every": 1}
    with pytest.raises(TrainingError, match=r"validation of step 1 failed: .*truncated\. The checkpoint of step 1 is"):
        train(tmp_path / "parts", validation=Unreadable(3), **options)
    parts = train(tmp_path / "parts", validation=Photos(3), **options)
    whole = train(tmp_path / "whole", validation=Photos(3), **options)
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")
    assert parts.best == whole.best


def test_environment_changes_no_step(tmp_path, monkeypatch):
    train(tmp_path / "alone", steps=2)
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    trainer = train(tmp_path / "set", steps=2)
    assert trainer.parallel is trainer.model
    assert losses(tmp_path / "set") == losses(tmp_path / "alone")


class Holder:
    """A transform with an option, and an object that JSON cannot represent."""

    def __init__(self, option: int):
        self.option, self.object = option, object()

    def __call__(self, sample, generator):
        return still(sample, generator)


def test_run_with_objects_in_its_transform_resumes(tmp_path):
    train(tmp_path, transform=Holder(1), steps=1)
    train(tmp_path, transform=Holder(1), steps=1)
    with pytest.raises(TrainingError, match=r"option was 1 and is now 2$"):
        train(tmp_path, transform=Holder(2), steps=1)
