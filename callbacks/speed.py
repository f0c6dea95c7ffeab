"""Training speed and epoch time, measured around the training batches alone."""

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback


class Speed(Callback):
    """Logs `speed/images_per_second` and `speed/epoch_seconds` after each epoch.

    Attributes:
        images_per_second: Over the last epoch's training batches, loading included, validation not; all processes.
        epoch_seconds: Time of the last epoch's training batches.
    """

    def __init__(self) -> None:
        self.images_per_second = 0.0
        self.epoch_seconds = 0.0
        self._images = 0
        self._start = 0.0

    def so_far(self) -> float:
        """Images a second since the epoch began."""
        return self._images / max(time.perf_counter() - self._start, 1e-9)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, for an epoch that is continued has no start."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._images = 0
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images; read the clock after the epoch's last batch, before validation."""
        self._images += len(batch[1]) * trainer.world_size
        if trainer.is_last_batch:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            self.epoch_seconds = time.perf_counter() - self._start
            self.images_per_second = self._images / self.epoch_seconds

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log both numbers."""
        values = {"speed/images_per_second": self.images_per_second, "speed/epoch_seconds": self.epoch_seconds}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)
