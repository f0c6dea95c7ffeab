"""A Rich bar on a terminal, one line an epoch elsewhere."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

from callbacks.speed import Speed

_DRAWINGS_A_SECOND = 5  # each holds up the training for milliseconds
# How often Lightning's thread looks whether something is to be drawn: where an epoch ends, training waits for it.
_LOOKS_A_SECOND = 100


def progress_callback(speed: Speed) -> Callback:
    """`EpochBars` where standard output is a terminal, `EpochLines` in pipes, files and CI."""
    return EpochBars(speed) if sys.stdout.isatty() else EpochLines(speed)


class EpochBars(RichProgressBar):
    """A bar an epoch with loss, accuracy and speed; epochs are counted from 1, as `--max_epochs` does.

    Args:
        speed: The callback that measures the epoch; it must stand before this one.
    """

    def __init__(self, speed: Speed) -> None:
        super().__init__(_LOOKS_A_SECOND, leave=True, theme=RichProgressBarTheme(metrics_format=".4f"))
        self._speed = speed
        self._drawn = 0.0

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float | dict]:
        """The logged metrics, and the images a second of the epoch that ended last."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the run's folder is named at the end
        if self._speed.images_per_second:
            metrics["images/s"] = f"{self._speed.images_per_second:,.0f}"
        return metrics

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar when it is due: doing so at every step would slow small networks down."""
        if trainer.is_last_batch or self._is_due():
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The same for the bar of the validation."""
        if self._is_due():
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now - self._drawn < 1 / _DRAWINGS_A_SECOND:
            return False
        self._drawn = now
        return True

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}".ljust(len(self.validation_description))


class EpochLines(ProgressBar):
    """Prints one line after each epoch: losses, accuracies, learning rate, speed and time.

    Args:
        speed: The callback that measures the epoch; it must stand before this one.
    """

    def __init__(self, speed: Speed) -> None:
        super().__init__()
        self._speed = speed
        self._enabled = True

    def disable(self) -> None:
        """Called by the Trainer on all processes but the first."""
        self._enabled = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch's line."""
        metrics = trainer.callback_metrics  # on all processes: reading them may need all
        if not self._enabled:
            return
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        for stage in ("train", "val"):
            if f"{stage}/loss" in metrics:
                parts.append(f"{stage} loss {metrics[f'{stage}/loss']:.4f} accuracy {metrics[f'{stage}/accuracy']:.4f}")
        parts.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.2e}")
        parts.append(f"{self._speed.images_per_second:,.0f} images/s")
        parts.append(f"{self._speed.epoch_seconds:.1f} s")
        print("  ".join(parts), flush=True)
