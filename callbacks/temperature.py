"""Temperature scaling: probabilities that mean what they say.

C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural Networks", 2017 (arXiv:1706.04599): the
logits are divided by the one number that makes the validation labels most likely, held near 1 where these are few. It
changes no prediction.
"""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

# Logarithms of the temperatures that are tried. The loss is smooth enough for a parabola to find the minimum between.
GRID = torch.linspace(math.log(0.2), math.log(20), 47)
# Times log(T)^2, in nats: as if log(T) were known beforehand to be 0, give or take 0.35. A few validation images say
# little, those that are all right nothing but that T should be the least possible; a few hundred outweigh it.
PRIOR = 4.0


class Temperature(Callback):
    """Fits `LitClassifier.temperature` again after each validation, before the checkpoint of that epoch is saved.

    A checkpoint of an epoch that was not validated holds that of the last validation. Only sums over images are kept,
    a loss for each temperature, which makes several processes simple. Without validation images it stays 1.
    """

    def __init__(self) -> None:
        self._losses = torch.zeros(len(GRID))

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start at zero."""
        self._losses = torch.zeros(len(GRID), device=pl_module.device)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Add the loss of a batch at each temperature; `outputs` are its logits (N, num_classes)."""
        logits, labels = outputs.float(), batch[1]
        temperatures = GRID.to(logits.device).exp()[:, None]
        right = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0] / temperatures  # (temperatures, N)
        # Images last, which is three times as fast as F.cross_entropy's layout.
        losses = (logits.t() / temperatures[:, :, None]).logsumexp(dim=1) - right
        self._losses += (losses * (labels >= 0)).sum(dim=1)  # ignored labels are negative

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the most likely temperature; all processes take part."""
        losses: Any = trainer.strategy.reduce(self._losses, reduce_op="sum")
        temperature = best_temperature(losses.cpu().double())
        if temperature is not None and not trainer.sanity_checking:
            pl_module.temperature = temperature  # type: ignore[assignment]


def best_temperature(losses: Tensor) -> float | None:
    """The most likely temperature, given sums of losses at `GRID`; None where they do not tell (no image, NaN)."""
    if not losses.isfinite().all() or not losses.any():
        return None
    losses = losses + PRIOR * GRID.double().square()
    best = int(losses.argmin())
    place = float(GRID[best])
    if 0 < best < len(GRID) - 1:
        before, here, after = losses[best - 1 : best + 2].tolist()
        curvature = before - 2 * here + after
        if curvature > 0:
            place += 0.5 * (before - after) / curvature * float(GRID[1] - GRID[0])
    return math.exp(place)
