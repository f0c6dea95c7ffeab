"""A run that is stopped anywhere and continued computes what the uninterrupted run computes, bit for bit."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class ExactResume(Callback):
    """Mends where Lightning (2.6) loses its place when a checkpoint was not saved at an epoch's end.

    The random draws and the order of the images need nothing stored: they derive from seed, epoch and batch. What is
    left is to say in the checkpoint where training stood, in terms that Lightning's loops continue from properly:

    - after an epoch's last batch, or during validation: the validation is done again, whole (Lightning would skip it,
      or do its second half alone);
    - after an epoch: at the start of the next (with `max_steps`, Lightning would end the same epoch twice), with
      `ReduceLROnPlateau` having seen it.

    Only metrics of a resumed epoch's training may differ: they cover the part that was left.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fetch from where the checkpoint stood: with workers, batches were fetched before it was loaded."""
        if trainer.fit_loop.is_resuming:
            assert trainer.fit_loop._data_fetcher is not None
            iter(trainer.fit_loop._data_fetcher)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Step `ReduceLROnPlateau` here: Lightning does so after the epoch's checkpoint, and not in a resumed epoch."""
        fit_loop = trainer.fit_loop
        if fit_loop.epoch_loop._num_ready_batches_reached():
            fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        fit_loop._restarting = True  # until this epoch is over: not to be stepped again

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say where training stands."""
        fit_loop: Any = trainer.fit_loop
        epoch_loop = fit_loop.epoch_loop
        saved = checkpoint["loops"]["fit_loop"]
        epochs, batches = saved["epoch_progress"], saved["epoch_loop.batch_progress"]
        validation = saved["epoch_loop.val_loop.batch_progress"]
        if epochs["current"]["ready"] == epochs["current"]["processed"]:  # between two epochs
            for progress in epochs.values():
                progress["completed"] = progress["processed"]
            batches["current"] = _at(batches["current"], 0)
            batches["is_last_batch"] = False
            validation["total"] = _at(validation["total"], 0)
            return
        validated = trainer.validating and validation["current"]["ready"] == validation["current"]["completed"]
        if trainer.validating or batches["is_last_batch"] or epoch_loop._should_check_val_fx(fit_loop._data_fetcher):
            for name in ("total", "current"):
                batches[name] = _at(batches[name], batches[name]["processed"])
            validation["current"] = _at(validation["current"], 0)
            validation["total"] = _at(validation["total"], 0)
            if not validated:  # one batch begun and not ended is how the loop tells that it was interrupted
                validation["total"] |= {"ready": 1, "started": 1}


def _at(progress: dict[str, int], count: int) -> dict[str, int]:
    return dict.fromkeys(progress, count)
