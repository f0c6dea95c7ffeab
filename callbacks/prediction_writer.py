"""Class probabilities of the predicted images as a CSV file."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.confusion import first_image
from callbacks.run_folder import next_folder


class PredictionWriter(Callback):
    """Writes one line per image: index, name if it has one, label, predicted class, and the probability of every class.

    With several processes, each writes its own batches, with the images' indices, into its own file.

    Args:
        parent: Where a folder is made for the file.
        class_names: Names of the classes, in order.

    Attributes:
        path: The file, when it is written.
        images: How many lines it has.
    """

    def __init__(self, parent: Path, class_names: Sequence[str]) -> None:
        self.path = parent
        self.class_names = class_names
        self.images = 0
        self._rows: list[list[Any]] = []

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Tensor, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Keep the rows of one batch."""
        labels = batch[1].tolist()
        first, names = first_image(trainer, batch_idx), getattr(trainer.datamodule, "test_names", None)  # type: ignore[attr-defined]
        best = torch.argmax(outputs, dim=1).tolist()
        for offset, (label, guess, probabilities) in enumerate(zip(labels, best, outputs.tolist(), strict=True)):
            if label >= 0:
                image = first + offset
                row = [image, *([names[image]] if names else []), self.class_names[label], self.class_names[guess]]
                self._rows.append(row + [f"{probability:.6f}" for probability in probabilities])

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        folder = str(next_folder(self.path, "predict")) if trainer.is_global_zero else ""
        number = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        self.path = Path(trainer.strategy.broadcast(folder)) / f"predictions{number}.csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)  # the first process has made its own machine's alone
        named = ["picture"] if hasattr(trainer.datamodule, "test_names") else []  # type: ignore[attr-defined]
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", *named, "label", "prediction", *self.class_names])
            writer.writerows(self._rows)
        self.images = len(self._rows)
