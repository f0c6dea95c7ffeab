"""Says before training which network it is."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from inspection.table import short_table


class ModelTable(Callback):
    """Prints the network in three lines before training.

    Args:
        input_shape: Shape (C, H, W) of one image.
    """

    def __init__(self, input_shape: tuple[int, int, int]) -> None:
        self._input_shape = input_shape

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print it once, on the first process."""
        if trainer.is_global_zero:
            print(short_table(pl_module.net, self._input_shape), flush=True)  # type: ignore[arg-type]
