"""Ends training that has gone wrong: a loss that is not finite, a network that does not leave chance."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.processes import Processes
from errors import Diverged, print_warning

ADVICE = "try a lower --lr, --trainer.gradient_clip_val 1, or --precision 32"
# The mean loss counts as chance within these factors of ln(number of classes).
CHANCE = (0.98, 1.1)
CHANCE_STEPS = 500


def is_overflow(error: BaseException) -> bool:
    """Whether PyTorch's optimisers report that a step's factor does not fit in the weights' type."""
    return isinstance(error, RuntimeError) and "cannot be converted to type" in str(error) and "overflow" in str(error)


class DivergenceGuard(Callback):
    """Raises `Diverged` at a loss that is not finite, and reports a network that is stuck at chance.

    On the CPU each batch's loss is checked before its optimiser step, so the weights stay those of the last good
    batch. On other devices a check at every step would make the CPU wait for the device, so the guard looks every
    `log_every_n_steps` batches and before each checkpoint: by then the weights in memory may be ruined, as a rule by
    the step before the bad loss, but no checkpoint is ever written with them, and the last good one stays. The last
    step of an epoch shows in no training loss: the validation loss is checked too, and each checkpoint's weights.

    A network is stuck at chance if its mean loss over the first 500 batches after a start or restart is that of
    guessing, ln(`num_classes`). Some initialisations of NiN and GoogLeNet never leave it (a few runs in a hundred in
    d2l's published executions).

    Args:
        processes: The callback that lets the processes agree.
        num_classes: Number of classes.
        stop_at_chance: Raise instead of only reporting it.
    """

    def __init__(self, processes: Processes, num_classes: int = 10, stop_at_chance: bool = False) -> None:
        self._processes = processes
        self._chance = math.log(num_classes)
        self._stop_at_chance = stop_at_chance
        self._steps = 0
        self._sum: Tensor | None = None  # of the losses of all steps, on the device

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Check the loss where that costs nothing."""
        if _is_free(trainer):
            self._end_unless_finite(trainer, loss)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up the losses, which does not wait for the device; check the sum now and then."""
        loss = outputs["loss"].detach().float() * trainer.accumulate_grad_batches  # by which Lightning has divided it
        self._sum = loss if self._sum is None else self._sum + loss
        self._steps += 1
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._steps % every == 0 and not _is_free(trainer):
            self._end_unless_finite(trainer, self._sum)
        # A teacher's probabilities have an entropy of their own, at high temperatures almost that of chance.
        if self._steps == CHANCE_STEPS and not batch[1].is_floating_point():
            self._check_chance(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the loss before the checkpoint of the best epoch is written."""
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None and not trainer.sanity_checking:
            self._end_unless_finite(trainer, loss, "validation loss is")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Refuse to write a checkpoint with ruined weights."""
        if self._sum is not None:
            self._end_unless_finite(trainer, self._sum)
            weights = [weight for weight in checkpoint["state_dict"].values() if weight.is_floating_point()]
            largest = [torch.linalg.vector_norm(weight.detach(), torch.inf) for weight in weights if weight.numel()]
            if largest:
                self._end_unless_finite(trainer, torch.stack([norm.float() for norm in largest]), "weights are")

    def _end_unless_finite(self, trainer: pl.Trainer, values: Tensor, what: str = "loss is") -> None:
        # Infinity and NaN stay in a sum, whichever step they came from.
        finite = math.isfinite(values.item()) if values.numel() == 1 else torch.isfinite(values).all().item()
        if self._processes.largest(int(not finite)):
            self._end(
                trainer,
                f"the {what} not finite in epoch {trainer.current_epoch + 1}, batch {trainer.fit_loop.batch_idx + 1}; "
                f"the checkpoints saved before are kept; {ADVICE}",
            )

    def _check_chance(self, trainer: pl.Trainer) -> None:
        assert self._sum is not None
        mean = self._sum.item() / self._steps
        stuck = CHANCE[0] * self._chance <= mean <= CHANCE[1] * self._chance
        if not self._processes.largest(int(stuck)):
            return
        message = (
            f"the network has not left chance: mean loss {mean:.3f} over {self._steps} batches, "
            f"guessing gives {self._chance:.3f}; try another --seed, a lower --lr or --model.initialization he"
        )
        if self._stop_at_chance:
            self._end(trainer, message)
        if trainer.is_global_zero:
            print_warning(message)

    def _end(self, trainer: pl.Trainer, message: str) -> None:
        self._processes.ignore_ends()
        raise Diverged(message if trainer.is_global_zero else "")


def _is_free(trainer: pl.Trainer) -> bool:
    return trainer.strategy.root_device.type == "cpu"
