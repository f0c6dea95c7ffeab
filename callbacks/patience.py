"""Early stopping that counts epochs, however often one is validated."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping

from callbacks.speed import Speed
from errors import print_warning


class Patience(EarlyStopping):
    """Ends training after some validated epochs without a better validation accuracy.

    Lightning's own counts validations where an epoch has several, and then ends within one.

    Args:
        epochs: How many.
        speed: The callback that knows whether an epoch was validated; it must come before this one.
    """

    def __init__(self, epochs: int, speed: Speed) -> None:
        self._epochs = epochs
        super().__init__("val/accuracy", patience=epochs, mode="max", strict=False, check_on_train_epoch_end=True)
        self._speed = speed

    @property
    def _legacy_state_key(self) -> Any:
        """The name of this callback in checkpoints of earlier versions."""
        return self.state_key.replace(type(self).__qualname__, EarlyStopping.__qualname__, 1)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train no further if the run that is continued ended so."""
        every: float | None = trainer.check_val_every_n_epoch
        if every is None:
            trainer.fit_loop.setup_data()  # which counts the batches
            every = (trainer.val_check_batch or 1) / trainer.num_training_batches
        self.patience = math.ceil(self._epochs / max(1, every))  # validated epochs, where not each is validated
        if self.wait_count >= self.patience:
            trainer.should_stop = True
            if trainer.is_global_zero:
                print_warning(f"--patience {self._epochs} has ended this run; a larger one trains it further")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the accuracy of the epoch's last validation."""
        if self._speed.validated:
            super().on_train_epoch_end(trainer, pl_module)
