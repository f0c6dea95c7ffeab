"""Training speed and epoch time, measured around the training batches only."""

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback


class Speed(Callback):
    """Logs `speed/images_per_second` and `speed/epoch_seconds` after each epoch; what was trained of it before the run
    was stopped and continued counts.

    Attributes:
        images_per_second: Over the last epoch's training batches, loading included, validation not; all processes.
        epoch_seconds: Time of the last epoch's training batches.
        validated: Whether there was a validation in the last epoch; else its metrics are an earlier epoch's.
    """

    def __init__(self) -> None:
        self.images_per_second = 0.0
        self.epoch_seconds = 0.0
        self.validated = False
        self._images = 0
        self._start = 0.0
        self._pause = 0.0

    def so_far(self) -> float:
        """Images per second since the epoch began."""
        return self._images / max(time.perf_counter() - self._start, 1e-9)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._images = 0
        self.validated = False
        self._start = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on in a continued epoch, which has no start of its own."""
        self._start = time.perf_counter() - self.epoch_seconds

    def state_dict(self) -> dict[str, Any]:
        """What was measured of the epoch so far."""
        return {"images": self._images, "seconds": self.epoch_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        images, seconds = state_dict.get("images"), state_dict.get("seconds")
        if type(images) is int and type(seconds) is float:
            self._images, self.epoch_seconds = images, seconds

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images and read the clock: any batch may be the epoch's last, for instance with `max_time`."""
        self._images += len(batch[1]) * trainer.world_size
        if trainer.strategy.root_device.type != "cpu" and (trainer.is_last_batch or trainer.fit_loop.epoch_loop.done):
            torch.accelerator.synchronize()
        self.epoch_seconds = time.perf_counter() - self._start

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._pause = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resume the clock."""
        self.validated = not trainer.sanity_checking
        self._start += time.perf_counter() - self._pause

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log both numbers."""
        if "train/loss" not in trainer.fit_loop._results.metrics(on_step=False)["callback"]:
            classifier: Any = pl_module  # a callback has ended the epoch in a validation, after its last batch
            classifier.log_train_metrics()
        self.images_per_second = self._images / self.epoch_seconds if self.epoch_seconds else 0.0
        values = {"speed/images_per_second": self.images_per_second, "speed/epoch_seconds": self.epoch_seconds}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)

    def measured(self, trainer: pl.Trainer) -> dict[str, torch.Tensor]:
        """The metrics of the epoch that ends, by name; to be called on all processes."""
        return {
            name: value
            for name, value in trainer.callback_metrics.items()
            if self.validated or not name.startswith("val/")
        }
