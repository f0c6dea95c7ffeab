"""A learning rate found by trial: a short training, on a separate network and data, whose rate rises each step."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.lr_curve import Curve
from datamodules.batches import TrainBatches
from errors import UserError

STEPS = 100
LOWEST, HIGHEST = 1e-8, 1.0
SMOOTHING = 0.9  # share of the average that each step keeps
DIVERGED = 4.0  # times the lowest loss: higher rates need not be tried
NEEDED_FALL = 0.99  # the lowest loss, as a share of the first, that is more than noise
Found = TypeVar("Found")


class RisingRate(Callback):
    """Sets the learning rate of each step and notes its loss.

    Attributes:
        rates: Learning rate of each step.
        losses: Training loss of each step, smoothed.
    """

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._average = self._loss = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the rate of the step that this batch belongs to."""
        rate = LOWEST * (HIGHEST / LOWEST) ** ((trainer.global_step + 1) / STEPS)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = rate
        if len(self.rates) == trainer.global_step:
            self.rates.append(rate)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record a moving average of the step's mean loss; stop when it explodes."""
        self._loss += float(outputs["loss"])  # Lightning has divided it by the number of batches
        step = trainer.global_step  # the one that just ended, counted from 1
        if step != len(self.rates):
            return  # batches of this step are still to come
        self._average = SMOOTHING * self._average + (1 - SMOOTHING) * self._loss
        self.losses.append(self._average / (1 - SMOOTHING**step))
        self._loss = 0.0
        trainer.should_stop = not self.losses[-1] <= DIVERGED * min(self.losses)


def find_learning_rate(
    model: LightningModule, data: Any, device: torch.device, accumulate_grad_batches: int, **settings: Any
) -> Curve:
    """Train while the learning rate rises from step to step; take a tenth of the rate at which the loss was lowest.

    (The rate where the loss falls fastest, which Lightning suggests, is decided by noise at tiny rates where the curve
    is flat: other seeds gave rates 1,000 times apart.)

    The schedule, callbacks and validation of the run are not used. The global random generators are left as
    they were.

    Args:
        model: A model that is not needed afterwards. Its own schedule is removed.
        data: A data module that is not needed afterwards, with `train_set` and `batch_size`.
        device: Where to train.
        accumulate_grad_batches: Batches to an optimiser step.
        settings: Further arguments of the Trainer: accelerator, precision, ...

    Raises:
        UserError: If the loss never fell, or an epoch is shorter than an optimiser step.

    Source: L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2015 (arXiv:1506.01186); the tenth is
    fast.ai's rule (https://docs.fast.ai/callback.schedule.html).
    """
    data.prepare_data()
    data.setup("fit")
    batches = len(TrainBatches(len(data.train_set), data.batch_size))
    batches -= batches % accumulate_grad_batches  # whole steps: Lightning ends an epoch with a smaller one
    if not batches:
        raise UserError("--lr auto: an epoch is shorter than one optimiser step; lower --batch_size, or give --lr")
    model.scheduler = None  # type: ignore[assignment]
    found = RisingRate()
    with isolate_rng():
        trainer = Trainer(
            # Named explicitly, because under torchrun or SLURM one device would mean one of a group.
            strategy=SingleDeviceStrategy(device),
            max_epochs=-1,
            max_steps=STEPS,
            accumulate_grad_batches=accumulate_grad_batches,
            limit_train_batches=batches,
            limit_val_batches=0,
            use_distributed_sampler=False,
            callbacks=[found],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        )
        trainer.fit(model, datamodule=data)
    losses = [loss if math.isfinite(loss) else math.inf for loss in found.losses]
    lowest = losses.index(min(losses))
    if not losses[lowest] < NEEDED_FALL * losses[0]:
        raise UserError(f"--lr auto found none: no learning rate made the loss fall within {STEPS} steps; give --lr")
    return Curve(float(f"{found.rates[lowest] / 10:.3g}"), found.rates, found.losses)


def from_first_process(find: Callable[[], Found], trainer: Trainer) -> Found:
    """What the first process finds, on all processes that torchrun or SLURM started.

    Args:
        find: Called on the first process only.
        trainer: With the run's accelerator, devices, strategy and machines. (The run's own Trainer can't be built
            before the setting is found; it takes over the process group.)

    Raises:
        UserError: If each machine was started by hand, so that they can't talk to each other yet.
    """
    strategy: Any = trainer.strategy
    environment = getattr(strategy, "cluster_environment", None)
    if trainer.world_size == 1 or environment is None:
        return find()
    if not environment.creates_processes_externally:
        if trainer.num_nodes > 1:
            raise UserError("what is found by trial (auto) needs torchrun or SLURM to start several machines")
        return find()  # the other processes are not started yet, and get it from this one
    # The others wait for the first in setup_environment: once there is a group, Lightning's loops wait for all of it.
    if environment.global_rank() == 0:
        found = find()
        strategy.setup_environment()
        return strategy.broadcast(found)
    try:
        strategy.setup_environment()
        return strategy.broadcast(None)
    except RuntimeError:  # the first process has ended, and said why
        raise UserError("") from None
