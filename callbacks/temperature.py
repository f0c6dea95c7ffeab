"""Temperature scaling: probabilities that mean what they say.

C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural Networks", 2017 (arXiv:1706.04599): the
logits are divided by the one number that makes the validation images likeliest. It changes no prediction.
"""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F

# Logarithms of the temperatures that are tried. The loss is smooth enough for a parabola to find the minimum between.
GRID = torch.linspace(math.log(0.2), math.log(20), 47)


class Temperature(Callback):
    """Fits `LitClassifier.temperature` anew after each validation, before the checkpoint of that epoch is saved.

    So each checkpoint holds the temperature of its own weights. Only sums over images are kept, a loss for each
    temperature, which makes several processes simple. Without validation images the temperature stays 1.
    """

    def __init__(self) -> None:
        self._losses = torch.zeros(len(GRID))

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start at zero."""
        self._losses = torch.zeros(len(GRID), device=pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the loss of a batch at each temperature; `outputs` are its logits (N, num_classes)."""
        temperatures = GRID.to(outputs.device).exp()
        scaled = outputs.float() / temperatures[:, None, None]  # (temperatures, N, num_classes)
        labels = batch[1].expand(len(GRID), -1)
        losses = F.cross_entropy(scaled.flatten(0, 1), labels.flatten(), reduction="none")  # 0 for ignored labels
        self._losses += losses.view(len(GRID), -1).sum(dim=1)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the temperature of the lowest loss; all processes take part."""
        losses: Any = trainer.strategy.reduce(self._losses, reduce_op="sum")
        temperature = best_temperature(losses.cpu().double())
        if temperature is not None and not trainer.sanity_checking:
            pl_module.temperature = temperature  # type: ignore[assignment]


def best_temperature(losses: Tensor) -> float | None:
    """The temperature with the lowest loss, given the losses at `GRID`; None where they do not tell (no image, NaN)."""
    if not losses.isfinite().all() or not losses.any():
        return None
    best = int(losses.argmin())
    place = float(GRID[best])
    if 0 < best < len(GRID) - 1:
        before, here, after = losses[best - 1 : best + 2].tolist()
        curvature = before - 2 * here + after
        if curvature > 0:
            place += 0.5 * (before - after) / curvature * float(GRID[1] - GRID[0])
    return math.exp(place)
