"""A run that is stopped anywhere and continued computes what the uninterrupted run computes, bit for bit."""

import copy
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from callbacks.speed import Speed
from errors import UserError

GRADIENTS = "summed_gradients"  # in a checkpoint that was saved between two optimiser steps
TRAINED = "training_metrics"  # in a checkpoint that was saved within an epoch
VALIDATED = "validation_metrics"  # in the same, of the epoch's last validation


class ExactResume(Callback):
    """Corrects where Lightning (2.6) resumes when a checkpoint was not saved at an epoch's end.

    The random draws and the order of the images need nothing stored: they derive from seed, epoch and batch. The
    checkpoint only has to say where training was, in a form from which Lightning's loops continue properly:

    - after an epoch's last batch, or during validation: the whole validation is repeated (Lightning would skip it,
      or do only its second half);
    - after an epoch: at the start of the next (with `max_steps`, Lightning would end the same epoch twice), with
      `ReduceLROnPlateau` having seen it;
    - between two optimiser steps, in a validation within an epoch: the gradients that were summed so far are saved;
    - within an epoch: so are the totals of the training metrics, and what was validated, which a schedule may follow.

    With more than two processes on the CPU, each gradient is summed in the order of the processes: DDP's own order
    depends on the gradient's place in a bucket, and the buckets change after the first step of each process.

    Args:
        speed: The callback that knows whether an epoch was validated.
    """

    def __init__(self, speed: Speed) -> None:
        self._speed = speed
        self._gradients: Any = None
        self._trained: Any = None
        self._validated: dict[str, Any] = {}
        self._ordered: Any = None  # the wrapped network whose gradients are summed in order

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep gradients and totals until the parameters are on the training device."""
        self._gradients, self._trained = checkpoint.get(GRADIENTS), checkpoint.get(TRAINED)
        self._validated = checkpoint.get(VALIDATED) or {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fetch from where the checkpoint was: with workers, batches were fetched before it was loaded."""
        if trainer.fit_loop.is_resuming:
            assert trainer.fit_loop._data_fetcher is not None
            iter(trainer.fit_loop._data_fetcher)
            self._restore(trainer, pl_module)
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Order the sums of gradients, also where `FreezeFeatures` has had the network wrapped again."""
        strategy = trainer.strategy
        model: Any = strategy.model
        if (
            isinstance(strategy, DDPStrategy)
            and strategy._ddp_comm_hook is None
            and trainer.world_size > 2
            and strategy.root_device.type == "cpu"
            and model is not self._ordered
        ):
            model.register_comm_hook(dist.group.WORLD, ordered_mean)
            self._ordered = model

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let all processes validate with the first one's statistics of batch normalisation, which the checkpoint has.

        While gradients are accumulated, DistributedDataParallel does not hand them out.
        """
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.require_forward_param_sync = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Step `ReduceLROnPlateau` here: Lightning does so after the epoch's checkpoint, and not in a resumed epoch."""
        fit_loop = trainer.fit_loop
        if fit_loop.epoch_loop._num_ready_batches_reached():
            fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        fit_loop._restarting = True  # until this epoch is over, so that it is not stepped again

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store where training is."""
        checkpoint["processes"] = trainer.world_size
        if trainer.state.fn == TrainerFn.FITTING and trainer.fit_loop._should_accumulate():
            checkpoint[GRADIENTS] = {
                name: _of_all_processes(trainer, parameter.grad)
                for name, parameter in pl_module.named_parameters()
                if parameter.grad is not None
            }
        fit_loop: Any = trainer.fit_loop
        epoch_loop = fit_loop.epoch_loop
        saved = checkpoint["loops"]["fit_loop"]
        epochs, batches = saved["epoch_progress"], saved["epoch_loop.batch_progress"]
        validation = saved["epoch_loop.val_loop.batch_progress"]
        if epochs["current"]["ready"] == epochs["current"]["processed"]:  # between two epochs
            for progress in epochs.values():
                progress["completed"] = progress["processed"]
            batches["current"] = dict.fromkeys(batches["current"], 0)
            batches["is_last_batch"] = False
            validation["total"] = dict.fromkeys(validation["total"], 0)
            return
        metrics: Any = copy.deepcopy(pl_module.metrics["train_"])  # type: ignore[index]
        if pl_module._since_last_log:
            metrics.add_trained(pl_module._since_last_log)
        checkpoint[TRAINED] = {
            name: {key: _of_all_processes(trainer, total) for key, total in metric.metric_state.items()}
            for name, metric in metrics.items(keep_base=True)
        }
        checkpoint[VALIDATED] = {
            name: value for name, value in self._speed.measured(trainer).items() if name.startswith("val/")
        }
        validated = trainer.validating and validation["current"]["ready"] == validation["current"]["completed"]
        if trainer.validating or batches["is_last_batch"] or epoch_loop._should_check_val_fx(fit_loop._data_fetcher):
            for name in ("total", "current"):
                batches[name] = dict.fromkeys(batches[name], batches[name]["processed"])
            validation["current"] = dict.fromkeys(validation["current"], 0)
            validation["total"] = dict.fromkeys(validation["total"], 0)
            if not validated:  # a batch begun and not ended tells the loop that it was interrupted
                validation["total"] |= {"ready": 1, "started": 1}

    def _restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def own(stored: Tensor, like: Tensor) -> Tensor:
            if stored.shape != (trainer.world_size, *like.shape) or stored.dtype != like.dtype:
                raise TypeError
            return torch.empty_like(like).copy_(stored[trainer.global_rank])

        parameters = dict(pl_module.named_parameters())
        metrics: Any = pl_module.metrics["train_"]  # type: ignore[index]
        try:
            for name, stored in (self._gradients or {}).items():
                parameters[name].grad = own(stored, parameters[name])
            for name, totals in (self._trained or {}).items():
                zeros = metrics[name].metric_state
                metrics[name].merge_state({key: own(totals[key].to(zero.dtype), zero) for key, zero in zeros.items()})
                metrics[name]._update_count += 1  # or it would warn that it has counted nothing
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{trainer.ckpt_path} is damaged: its gradients or metrics are not those of this network; training "
                "can't continue from it"
            ) from None
        if self._trained and trainer.fit_loop.epoch_loop._num_ready_batches_reached():  # no batch is left to log after
            pl_module.log_dict(metrics, on_step=False, on_epoch=True)
        for name, value in self._validated.items():
            if name.startswith("val/") and isinstance(value, Tensor) and value.numel() == 1:
                self._speed.validated = True
                trainer._logger_connector._callback_metrics[name] = value.to(trainer.strategy.root_device)
        self._gradients = self._trained = None


class SavedPrecision(Callback):
    """Gives the weights their own precision before a checkpoint is loaded, which would otherwise round to float32.

    (Lightning 2.6 converts the module afterwards.) It must come before callbacks that copy the module, like EMA.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Convert the weights."""
        if isinstance(trainer.precision_plugin, DoublePrecision | HalfPrecision):
            trainer.precision_plugin.convert_module(pl_module)


def ordered_mean(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook for DDP: the mean over the processes, always summed in rank order."""
    mine = bucket.buffer()
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    work = dist.all_gather(parts, mine, group=group, async_op=True)

    def mean(_: Any) -> Tensor:
        mine.copy_(parts[0])
        for part in parts[1:]:
            mine.add_(part)
        return mine.div_(len(parts))

    return work.get_future().then(mean)


def _of_all_processes(trainer: pl.Trainer, gradient: Tensor) -> Tensor:
    """The tensors of all processes, (processes, *shape), on the CPU."""
    if trainer.world_size == 1:
        return gradient.detach().cpu()[None]
    return trainer.strategy.all_gather(gradient.detach()).cpu()
