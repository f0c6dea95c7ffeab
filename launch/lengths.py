"""Settings that depend on how many batches an epoch and an evaluation have."""

import math
from collections.abc import Sized

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler

from datamodules import FashionMNISTDataModule
from datamodules.batches import EvalBatches, TrainBatches
from errors import UserError, count
from lit_modules import LitClassifier


def check_length(trainer: Trainer, model: LitClassifier, data: FashionMNISTDataModule, then_test: bool) -> None:
    """Refuse what does not fit the number of batches, of training, validation and test.

    Args:
        trainer: The run's Trainer.
        model: Its classifier.
        data: The data module, set up.
        then_test: Whether a test follows.
    """
    limited = _limited(trainer, "train", data.train_set, data.batch_size)
    for name, images in (("val", data.val_set), *([("test", data.test_set)] if then_test else [])):
        _limited(trainer, name, images, data.eval_batch_size)
    interval = trainer.val_check_interval
    if trainer.check_val_every_n_epoch is not None and isinstance(interval, int) and interval > limited > 0:
        raise UserError(
            f"trainer.val_check_interval={interval} is more than an epoch, which has "
            f"{count(limited, 'training batch')}; lower it, or count on over the epochs with "
            "--trainer.check_val_every_n_epoch null"
        )
    given = getattr(model.scheduler, "keywords", {})
    if "max_lr" in given and (given.get("total_steps") or 0) > 0:  # OneCycleLR can't continue after its end
        by_step = model.hparams["scheduler_interval"] == "step"
        epochs = trainer.max_epochs
        steps = math.inf if epochs in (None, -1) else _steps(trainer, limited, epochs) if by_step else epochs
        if by_step and trainer.max_steps > 0:
            steps = min(steps, trainer.max_steps)
        if given["total_steps"] < steps:
            if steps == math.inf:
                raise UserError(f"OneCycleLR ends after {given['total_steps']} steps, the run never: give --max_epochs")
            raise UserError(
                f"OneCycleLR with total_steps={given['total_steps']} ends before the run, which takes "
                f"{count(int(steps), 'step')}; leave total_steps out: it then takes the run's length"
            )


def _steps(trainer: Trainer, batches: int, epochs: int) -> int:
    """The optimiser's steps in epochs of so many batches."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            return sum(math.ceil(batches / callback.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
    return math.ceil(batches / trainer.accumulate_grad_batches) * epochs


def _limited(trainer: Trainer, name: str, images: Sized, batch_size: int) -> int:
    """Batches of an epoch, or of an evaluation, on each process."""
    kind = TrainBatches if name == "train" else EvalBatches
    batches = len(kind(len(images), batch_size, 0, trainer.world_size))
    limit = getattr(trainer, f"limit_{name}_batches")
    limited = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if limit and batches and not limited:
        overfitting = getattr(trainer, "overfit_batches", 0) and name != "test"  # which sets the other two
        flag = "overfit_batches" if overfitting else f"limit_{name}_batches"
        raise UserError(f"trainer.{flag}={limit} is less than a batch; there are {count(batches, 'batch')}: raise it")
    return limited
