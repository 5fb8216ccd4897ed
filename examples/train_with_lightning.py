"""Train a UPerNet with Lightning, by the published recipe of its backbone.

    python examples/train_with_lightning.py DATA OUTPUT --model openmmlab/upernet-convnext-tiny

DATA is a dataset's folder, as for `fastuper train`, with the splits training and validation. OUTPUT becomes the folder
of the trained checkpoint.
"""

from __future__ import annotations

import argparse
from functools import partial

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastuper import UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.data import TrainingTransform, open_dataset
from fastuper.evaluation import evaluate
from fastuper.recipes import learning_rate_factor, parameter_groups, recipe_for


class Augmented(Dataset):
    """Photos and label maps with new augmentation at each access: pairs of `pixel_values` and `labels`."""

    def __init__(self, samples, transform):
        self.samples, self.transform = samples, transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        item = self.transform(self.samples[index], np.random.default_rng())
        return item["pixel_values"], item["labels"]


class Segmentation(lightning.LightningModule):
    def __init__(self, model: UperNetForSemanticSegmentation, steps: int):
        super().__init__()
        self.model, self.steps = model, steps

    def training_step(self, batch, _):
        pixel_values, labels = batch
        loss = self.model(pixel_values, labels=labels).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        recipe = recipe_for("auto", self.model.config.backbone_config)
        optimizer = torch.optim.AdamW(parameter_groups(self.model, recipe))
        factor = partial(learning_rate_factor, steps=self.steps, warmup_steps=self.steps // 10, power=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--model", required=True, help="UPerNet checkpoint to start from")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--crop", type=int, default=512)
    options = parser.parse_args()

    training, validation = (open_dataset(options.data, split) for split in ("training", "validation"))
    processor = UperNetImageProcessor.from_pretrained(options.model)
    model = UperNetForSemanticSegmentation.from_pretrained(
        options.model, id2label=training.id2label, ignore_mismatched_sizes=True
    )
    loader = DataLoader(
        Augmented(training, TrainingTransform(processor, options.crop)), batch_size=options.batch_size, shuffle=True
    )
    trainer = lightning.Trainer(max_steps=options.steps, logger=False, enable_checkpointing=False)
    trainer.fit(Segmentation(model.train(), options.steps), loader)
    print(evaluate(model, validation, processor).table())
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)


if __name__ == "__main__":
    main()
