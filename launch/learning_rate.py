"""A learning rate found by trial: Lightning's finder, on a network and data of its own."""

import contextlib
import io
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.seed import isolate_rng

from errors import UserError

STEPS = 100
LOWEST, HIGHEST = 1e-8, 1.0
SMOOTHING = 0.9  # share of the average that each step keeps
LIGHTNINGS_SMOOTHING = 0.98
NEEDED_FALL = 0.99  # the lowest loss, as a share of the first, that is more than noise
Found = TypeVar("Found")


class Curve(NamedTuple):
    """What a search measured.

    Attributes:
        learning_rate: The rate to take, with three significant digits.
        rates: Learning rate of each step.
        losses: Training loss of each step, smoothed; NaN where it was not finite.
    """

    learning_rate: float
    rates: list[float]
    losses: list[float]


def find_learning_rate(
    model: LightningModule, data: Any, device: torch.device, accumulate_grad_batches: int, **settings: Any
) -> Curve:
    """Train while the learning rate rises from step to step; take a tenth of the rate at which the loss was lowest.

    (Lightning's own suggestion, where the loss fell fastest, is measured against the rate itself and not its
    logarithm: where the curve is flat, noise at tiny rates decides, so that other seeds gave rates 1,000 times apart.)

    The schedule, the callbacks and the validation of the run take no part. The global random generators are left as
    they were.

    Args:
        model: A model to spend. Its own schedule is taken away.
        data: A data module to spend, with `train_set` and `batch_size`.
        device: Where to train.
        accumulate_grad_batches: Batches to an optimiser step.
        settings: Further arguments of the Trainer: accelerator, precision, ...

    Raises:
        UserError: If the loss never fell, or an epoch is shorter than an optimiser step.

    Source: L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2015 (arXiv:1506.01186), in the
    implementation of Lightning; the tenth is fast.ai's rule (https://docs.fast.ai/callback.schedule.html).
    """
    data.prepare_data()
    data.setup("fit")
    batches = math.ceil(len(data.train_set) / data.batch_size)
    # Lightning counts wrongly if an epoch ends within an optimiser step.
    batches -= batches % accumulate_grad_batches
    if not batches:
        raise UserError("--lr auto: an epoch is shorter than one optimiser step; lower --batch_size, or give --lr")
    model.scheduler = None  # type: ignore[assignment]  # the finder sets the rates
    with isolate_rng(), _no_bar_in_files():
        trainer = Trainer(
            # Named, because under torchrun or SLURM one device would mean one of a group.
            strategy=SingleDeviceStrategy(device),
            max_epochs=-1,  # the finder ends it
            accumulate_grad_batches=accumulate_grad_batches,
            limit_train_batches=batches,
            check_val_every_n_epoch=2**31,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=[_InMemory()],
            **settings,
        )
        finder = Tuner(trainer).lr_find(
            model, datamodule=data, min_lr=LOWEST, max_lr=HIGHEST, num_training=STEPS, update_attr=False
        )
    assert finder is not None
    losses = _smoothed(loss * accumulate_grad_batches for loss in _as_measured(finder.results["loss"]))
    rates = finder.results["lr"]
    lowest = min(range(len(losses)), key=lambda step: losses[step] if math.isfinite(losses[step]) else math.inf)
    if not losses[lowest] < NEEDED_FALL * losses[0]:
        raise UserError(f"--lr auto found none: no learning rate made the loss fall within {STEPS} steps; give --lr")
    return Curve(float(f"{rates[lowest] / 10:.3g}"), rates, losses)


def from_first_process(find: Callable[[], Found], trainer: Trainer) -> Found:
    """What the first process finds, on all of those that torchrun or SLURM started.

    Args:
        find: Called on the first process alone.
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


class _InMemory(CheckpointIO):
    """Keeps the finder's checkpoint where nothing can be left behind.

    It refers to the weights and is no copy of them: that the search trains on is no harm, for its model is spent.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self._checkpoint = checkpoint

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return self._checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        self._checkpoint = {}


@contextlib.contextmanager
def _no_bar_in_files() -> Any:
    """The finder's bar can't be switched off, and is one endless line in a file."""
    if sys.stderr.isatty():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def _as_measured(averages: list[float]) -> Iterator[float]:
    """Undo Lightning's average: it lags far behind the rate, and its first values are too low (as of 2.6).

    Lightning divides it by 1 - beta ** (step + 1) where beta ** step would be right.
    """
    last = 0.0
    for step, average in enumerate(averages, 1):
        total = average * (1 - LIGHTNINGS_SMOOTHING ** (step + 1))
        yield (total - LIGHTNINGS_SMOOTHING * last) / (1 - LIGHTNINGS_SMOOTHING)
        last = total


def _smoothed(losses: Iterable[float]) -> list[float]:
    average, smoothed = 0.0, []
    for step, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**step))
    return smoothed
