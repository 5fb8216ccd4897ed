"""Training beside Transformers: steps of AdamW, Transformers' Trainer, Lightning and PEFT."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import Dataset

import fastuper
from bench.numerics import error
from bench.pairs import VERSION_5, images, pair
from tests.parity.models import FAMILIES, config, segmentation_labels, with_exhaustive_variations

STEPS = 20


def train(model: nn.Module, steps: int = STEPS) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(images(3, 3, 64, 64, seed=step), labels=segmentation_labels(3, 64, 64, seed=step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", with_exhaustive_variations(FAMILIES))
def test_twenty_steps_follow_transformers(family):
    """The steps are in float64, without drop path and dropout."""
    theirs, ours = pair(config(family), train=True)
    start = copy.deepcopy(ours.state_dict())
    expected, losses = train(theirs), train(ours)
    assert losses == pytest.approx(expected, rel=1e-8)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)
    # AdamW divides a gradient by its own size: that of a key's bias is rounding alone, and moves it by whole steps.
    without_keys = {name: value for name, value in ours.state_dict().items() if ".key.bias" not in name}
    other = {name: value for name, value in named_as_ours(theirs, ours).items() if name in without_keys}
    assert without_keys.keys() == other.keys()
    for name, value in without_keys.items():
        if value.is_floating_point() and value.norm() > 0:
            assert error(value, other[name]) < 1e-8, name
        elif not value.is_floating_point():
            assert torch.equal(value, other[name]), name
    assert error(start["decode_head.classifier.weight"], ours.state_dict()["decode_head.classifier.weight"]) > 1e-3


def named_as_ours(theirs: nn.Module, ours: nn.Module) -> dict[str, torch.Tensor]:
    again = copy.deepcopy(ours)
    again.load_state_dict(theirs.state_dict())
    return again.state_dict()


class Samples(Dataset[dict[str, torch.Tensor]]):
    """Images of noise with labels; 12 i rows of image i are ignored."""

    def __init__(self, count: int, ignore_index: int = 255):
        self.count, self.ignore_index = count, ignore_index

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = segmentation_labels(1, 64, 64, seed=index)[0]
        labels[labels == 255] = self.ignore_index
        labels[: 12 * index] = self.ignore_index
        return {"pixel_values": images(1, 3, 64, 64, seed=index, dtype=torch.float32)[0], "labels": labels}


def with_trainer(
    model: nn.Module,
    folder: Any,
    samples: Dataset[Any],
    kind: Any = transformers.Trainer,
    resume: str | None = None,
    optimizers: Callable[[nn.Module], Any] = lambda model: (None, None),
    **values: Any,
) -> transformers.Trainer:
    """Train with Transformers' Trainer, from a checkpoint if one is given.

    `kind` is the class of the trainer, `values` are training arguments, and `optimizers` returns Trainer's argument of
    that name.
    """
    given = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "optim": "adamw_torch"}
    given |= {"save_strategy": "no", **values}
    arguments = transformers.TrainingArguments(
        str(folder), report_to=[], logging_steps=1, disable_tqdm=True, use_cpu=True, **given
    )
    trainer = kind(model, arguments, train_dataset=samples, eval_dataset=samples, optimizers=optimizers(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pinned memory without an accelerator
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_and_its_checkpoint(tmp_path):
    theirs, ours = pair(config("convnext"), dtype=torch.float32, train=True)
    trainers = [with_trainer(model, tmp_path / "run", Samples(4)) for model in (theirs, ours)]
    expected, losses = (
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in trainers
    )
    assert len(losses) == 2
    assert losses == pytest.approx(expected, rel=1e-4)
    prediction = trainers[1].predict(Samples(2))
    assert prediction.predictions.shape == (2, 7, 64, 64)
    assert prediction.metrics["test_loss"] > 0
    trainers[1].save_model(str(tmp_path / "saved"))
    pixels = images(2, 3, 64, 64, dtype=torch.float32)
    logits = [
        library.UperNetForSemanticSegmentation.from_pretrained(tmp_path / "saved").eval()(pixels).logits
        for library in (fastuper, transformers)
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits[0], ours.eval()(pixels).logits)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient-checkpointing"])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, checkpointing):
    """With ignore_index -100, by which Trainer counts labels; the parts have different numbers of ignored labels."""
    models = []
    for batch, parts in ((4, 1), (1, 4)):
        model = pair(config("swin", loss_ignore_index=-100), dtype=torch.float32, train=True)[1]
        for norm in model.modules():  # frozen: four images together have other statistics than each alone
            if isinstance(norm, nn.BatchNorm2d):
                norm.train = lambda mode=True: None
                norm.training = False
        with_trainer(
            model,
            tmp_path,
            Samples(4, ignore_index=-100),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=parts,
            max_steps=1,
            optim="sgd",
            max_grad_norm=1e9,
            gradient_checkpointing=checkpointing and parts > 1,
        )
        assert model.is_gradient_checkpointing == (checkpointing and parts > 1)
        models.append(model)
    start = pair(config("swin"), dtype=torch.float32)[1].state_dict()
    moved = 0.0
    for (name, whole), (_, parts) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        step, other = whole - start[name], parts - start[name]
        torch.testing.assert_close(step, other, rtol=1e-3, atol=1e-7)
        moved += step.norm().item()
    assert moved > 1e-3


def test_trainer_counts_labels_only_if_the_loss_ignores_the_same():
    assert not pair(config("convnext"))[1].accepts_loss_kwargs
    assert pair(config("convnext", loss_ignore_index=-100))[1].accepts_loss_kwargs


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model
            self.losses: list[float] = []

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    losses = []
    for model in pair(config("resnet-basic"), dtype=torch.float32, train=True):
        module = Module(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                accelerator="cpu",
                max_steps=2,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=tmp_path,
            )
            trainer.fit(module, torch.utils.data.DataLoader(Samples(4), batch_size=2))
        losses.append(module.losses)
    assert len(losses[1]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1][0] != losses[1][1]


def test_isinstance_alone_takes_the_model_for_one_of_transformers():
    ours = pair(config("resnet-basic"))[1]
    assert isinstance(ours, transformers.PreTrainedModel)
    assert isinstance(ours, fastuper.UperNetForSemanticSegmentation)
    assert type(ours) is fastuper.UperNetForSemanticSegmentation
    assert type(ours.__class__(ours.config)) is fastuper.UperNetForSemanticSegmentation
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is fastuper.UperNetForSemanticSegmentation
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_lora_on_the_whole_model():
    peft = pytest.importorskip("peft")
    ours = pair(config("swin"), dtype=torch.float32, train=True)[1]
    wrapped = peft.get_peft_model(ours, peft.LoraConfig(target_modules=["query", "value"]))
    wrapped(
        pixel_values=images(2, 3, 64, 64, dtype=torch.float32), labels=segmentation_labels(2, 64, 64)
    ).loss.backward()
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


class Uncounted(transformers.Trainer):
    """A Trainer that counts no labels."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def accumulated(library: Any, parts: int, ignore_index: int, counted: bool, folder: Any) -> tuple[float, float]:
    """Return the loss that Trainer reports for a step of two images, and the length of the step."""
    given = config("convnext", loss_ignore_index=ignore_index)
    model = pair(given, dtype=torch.float32, train=True)[library is fastuper]
    for norm in model.modules():  # frozen: two images together have other statistics than each alone
        if isinstance(norm, nn.BatchNorm2d):
            norm.train = lambda mode=True: None
            norm.training = False
    start = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = with_trainer(
        model,
        folder,
        Samples(2, ignore_index=ignore_index),
        kind=transformers.Trainer if counted else Uncounted,
        per_device_train_batch_size=2 // parts,
        gradient_accumulation_steps=parts,
        max_steps=1,
        optim="sgd",
        max_grad_norm=1e9,
    )
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    step = [old - new for old, new in zip(start, model.parameters(), strict=True)]
    return loss, torch.cat([part.flatten() for part in step]).norm().item()


@pytest.mark.parametrize("ignore_index", [255, -100])
def test_gradient_accumulation(ignore_index, tmp_path):
    """What docs/differences.md says of each version; the two images have other shares of ignored pixels."""
    whole = accumulated(transformers, 1, ignore_index, True, tmp_path)
    mean_of_means = accumulated(transformers, 2, ignore_index, False, tmp_path)
    assert mean_of_means != pytest.approx(whole, rel=1e-3)
    theirs = accumulated(transformers, 2, ignore_index, True, tmp_path)
    times = 2 if VERSION_5 else 1  # 5.x passes the count, by which the model does not divide, and divides no more
    assert theirs == pytest.approx([times * value for value in mean_of_means], rel=1e-3)
    ours = accumulated(fastuper, 2, ignore_index, True, tmp_path)
    assert ours == pytest.approx(whole if ignore_index == -100 else mean_of_means, rel=1e-4)
    assert accumulated(fastuper, 2, ignore_index, False, tmp_path) == pytest.approx(mean_of_means, rel=1e-4)
