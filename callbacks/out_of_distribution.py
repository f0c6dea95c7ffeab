"""Learns from the validation images which images are strange to the network."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_modules.execution.out_of_distribution import OutOfDistribution


class FitOutOfDistribution(Callback):
    """Fits `LitClassifier.out_of_distribution` after each validation, before the checkpoint of that epoch is saved."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Keep a batch's logits (N, num_classes)."""
        if batch_idx == 0:
            self._batches.clear()  # of a validation that was interrupted
        self._batches.append(outputs.detach().float()[batch[1] >= 0])  # ignored labels are negative

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit to the images of all processes, which all take part."""
        if not self._batches:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        mine = torch.cat(self._batches)
        # All processes must bring as many rows: each has as many batches.
        rows = torch.full((len(self._batches) * data.eval_batch_size, mine.shape[1]), torch.nan, device=mine.device)
        rows[: len(mine)] = mine
        self._batches.clear()
        everyones: Any = pl_module.all_gather(rows)
        everyones = everyones.reshape(-1, mine.shape[1])
        if not trainer.sanity_checking:
            pl_module.out_of_distribution = OutOfDistribution.fit(everyones[everyones.isfinite().all(dim=1)])  # type: ignore[assignment]
