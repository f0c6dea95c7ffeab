"""Which classes are mistaken for which in each evaluation, and the most confident mistakes."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from pictures.mistakes import Mistake

MISTAKES = 16  # that are kept


def first_image(trainer: pl.Trainer, batch_idx: int) -> int:
    """Place in the whole set of an evaluation batch's first image: the processes take batches in turn."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return (batch_idx * trainer.world_size + trainer.global_rank) * data.eval_batch_size


class Confusion(Callback):
    """Keeps the logits of an evaluation on the device and counts them once, at its end.

    Args:
        class_names: Names of the classes, in order.

    Attributes:
        matrix: Images (C, C) of the last evaluation, of all processes; rows are true classes, columns predictions.
        mistakes: The most confident ones of the last evaluation, the worst first.
        right: Whether the last test got each image right, in their order.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = class_names
        self.matrix = torch.zeros(len(class_names), len(class_names), dtype=torch.long)
        self.mistakes: list[Mistake] = []
        self.right: list[bool] = []
        self._batches: list[tuple[int, Tensor, Tensor]] = []

    @property
    def class_accuracy(self) -> dict[str, float]:
        """Share of each class's images that the last evaluation got right; without classes that had no image."""
        counts = zip(self.class_names, self.matrix.diagonal().tolist(), self.matrix.sum(dim=1).tolist(), strict=True)
        return {name: right / images for name, right, images in counts if images}

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean of the classes' accuracies; None where all have as many images, for then it is the accuracy."""
        by_class = self.class_accuracy
        equal = len(set(self.matrix.sum(dim=1).tolist())) == 1
        return None if equal or not by_class else sum(by_class.values()) / len(by_class)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Keep a batch's logits."""
        self._keep(trainer, outputs, batch[1], batch_idx)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *rest: Any) -> None:
        """Keep a batch's logits, calibrated as `predict` does, so that a mistake has one probability."""
        self.on_validation_batch_end(trainer, pl_module, outputs / pl_module.temperature, *rest)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Keep a batch's probabilities; their logarithms are logits."""
        self._keep(trainer, outputs.log(), batch[1], batch_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count; all processes take part."""
        self._count_up(pl_module)

    on_predict_epoch_end = on_validation_epoch_end

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count, and note which images were right; all processes take part."""
        indices, right = self._count_up(pl_module)
        images = int(self.matrix.sum())
        everyones = torch.zeros(images, dtype=torch.uint8, device=right.device)
        everyones[indices[right]] = 1  # each process knows its own
        gathered: Any = pl_module.all_gather(everyones)
        self.right = gathered.reshape(-1, images).any(dim=0).tolist()

    def _keep(self, trainer: pl.Trainer, logits: Tensor, labels: Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            self._batches.clear()  # of an evaluation that was interrupted
        self._batches.append((first_image(trainer, batch_idx), logits.detach(), labels))

    def _count_up(self, pl_module: pl.LightningModule) -> tuple[Tensor, Tensor]:
        """Count; returns the places of this process's images in their set, and whether they were right."""
        logits = torch.cat([logits for _, logits, _ in self._batches]).float()
        labels = torch.cat([labels for _, _, labels in self._batches])
        first = torch.cat([torch.arange(len(labels)) + first for first, _, labels in self._batches]).to(labels.device)
        self._batches.clear()
        counted = labels >= 0  # a batch that only fills up a process's share has negative ones
        logits, labels, indices = logits[counted], labels[counted], first[counted]
        # Not by torchmetrics, which on MPS, or if it is to be deterministic, takes images x classes² numbers.
        size = len(self.class_names)
        counts = torch.bincount((labels * size + logits.argmax(dim=1)).cpu(), minlength=size * size)
        counts = pl_module.trainer.strategy.reduce(counts.to(labels.device), reduce_op="sum")
        self.matrix = counts.cpu().view(size, size)

        probability, guesses = logits.softmax(dim=1).max(dim=1)
        rows = torch.stack([probability.nan_to_num(0.0), indices, labels, guesses], dim=1)[guesses != labels]
        rows = rows[rows[:, 0].argsort(descending=True, stable=True)][:MISTAKES]
        # All processes must bring the same number of rows.
        padded = torch.full((MISTAKES, 4), -1.0, device=rows.device)
        padded[: len(rows)] = rows
        everyones: Any = pl_module.all_gather(padded)
        everyones = everyones.reshape(-1, 4).cpu()
        everyones = everyones[everyones[:, 0].argsort(descending=True, stable=True)][:MISTAKES]
        self.mistakes = [
            Mistake(int(index), int(label), int(guess), probability)
            for probability, index, label, guess in everyones.tolist()
            if probability >= 0
        ]
        return indices, guesses == labels
