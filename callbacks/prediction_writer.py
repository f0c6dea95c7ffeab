"""Class probabilities of the predicted images as a CSV file."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class PredictionWriter(Callback):
    """Writes one line per image: index, label, predicted class, and the probability of every class.

    With several processes, each writes its own batches, with the images' indices, into its own file.

    Args:
        path: The CSV file.
        class_names: Names of the classes, in order.
    """

    def __init__(self, path: Path, class_names: Sequence[str]) -> None:
        self.path = path
        self.class_names = class_names
        self.images = 0
        self._rows: list[list[Any]] = []

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Tensor,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows of one batch."""
        labels = batch[1].tolist()
        # Batches are distributed in turn: this one is the (batch_idx * world_size + rank)-th of the whole set.
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        first = (batch_idx * trainer.world_size + trainer.global_rank) * data.eval_batch_size
        best = torch.argmax(outputs, dim=1).tolist()
        for offset, (label, guess, probabilities) in enumerate(zip(labels, best, outputs.tolist(), strict=True)):
            if label >= 0:
                row = [first + offset, self.class_names[label], self.class_names[guess]]
                self._rows.append(row + [f"{probability:.6f}" for probability in probabilities])

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        if trainer.world_size > 1:
            self.path = self.path.with_stem(f"{self.path.stem}-{trainer.global_rank}")
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "label", "prediction", *self.class_names])
            writer.writerows(self._rows)
        self.images = len(self._rows)
