"""Train a UPerNet with Transformers' Trainer, and measure its mIoU.

    python examples/train_with_transformers_trainer.py DATA OUTPUT --model openmmlab/upernet-convnext-tiny

DATA is a dataset's folder, as for `fastuper train`, with the splits training and validation. OUTPUT becomes the folder
of the trained checkpoint.
"""

from __future__ import annotations

import argparse

import numpy as np
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from fastuper import UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.data import TrainingTransform, open_dataset
from fastuper.evaluation import evaluate


class Augmented(Dataset):
    """Photos and label maps with new augmentation at each access: the model's `pixel_values` and `labels`."""

    def __init__(self, samples, transform):
        self.samples, self.transform = samples, transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        item = self.transform(self.samples[index], np.random.default_rng())
        # Trainer counts labels of accumulated batches, and leaves out -100 only.
        labels = item["labels"].masked_fill(item["labels"] == self.samples.ignore_index, -100)
        return {"pixel_values": item["pixel_values"], "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--model", required=True, help="UPerNet checkpoint to start from")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--crop", type=int, default=512)
    options = parser.parse_args()

    training, validation = (open_dataset(options.data, split) for split in ("training", "validation"))
    processor = UperNetImageProcessor.from_pretrained(options.model)
    model = UperNetForSemanticSegmentation.from_pretrained(
        options.model, id2label=training.id2label, ignore_mismatched_sizes=True, loss_ignore_index=-100
    )
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=2,
        learning_rate=6e-5,
        weight_decay=0.01,
        lr_scheduler_type="polynomial",
        warmup_steps=options.steps // 10,
        logging_steps=10,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=Augmented(training, TrainingTransform(processor, options.crop)))
    trainer.train()
    print(evaluate(model, validation, processor).table())
    trainer.save_model(options.output)
    processor.save_pretrained(options.output)


if __name__ == "__main__":
    main()
