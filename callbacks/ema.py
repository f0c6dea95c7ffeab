"""Exponential moving average (EMA) of the weights: validation, test, prediction and export use the averaged ones."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from errors import UserError


class EMA(WeightAveraging):
    """Averages weights and batch norm statistics after each optimiser step (Polyak and Juditsky 1992,
    https://doi.org/10.1137/0330046).

    A recipe switches it on under `trainer.callbacks`. The `state_dict` of a checkpoint is then the averaged network;
    what training continues from is stored beside it.

    Differs from Lightning's `EMAWeightAveraging` (2.6) in that the decay warms up, so that the first weights are soon
    forgotten; in that the average is on the training device (Lightning's is made before the network moves there);
    and in that testing after training in the same process measures the average, not the last weights.

    Args:
        decay: Share of the old average in the new one. After t updates min(decay, (1 + t) / (10 + t)) is used.

    Raises:
        ValueError: If the decay is not in [0, 1).
        UserError: When training begins, if the weights are numbers of 16 bits.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay={decay} must lie in [0, 1)")
        self.decay = decay
        super().__init__()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the network to the device that it will be trained on."""
        if stage == TrainerFn.FITTING and trainer.precision in ("bf16-true", "16-true"):
            given = trainer.precision
            problem = f"--precision {given} would round away the steps of averaged weights; take {given[:-4]}mixed"
            raise UserError(problem if trainer.is_global_zero else "")
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if stage == TrainerFn.FITTING:
            assert self._average_model is not None
            # Counted on the CPU: each step reads it, and on the device it would have to wait.
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()
            self._latest_update_step = trainer.global_step  # not that of a training before, in the same process
        elif stage == TrainerFn.VALIDATING:
            self._average_model = None  # that training's, which has been copied into the network

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore average and weights to continue training; otherwise the network has the average already."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Average, if the optimiser made a step. Torch's `update_parameters` waits for the device twice in each."""
        if trainer.global_step <= self._latest_update_step:
            return
        self._latest_update_step = trainer.global_step
        assert self._average_model is not None
        updates = int(self._average_model.n_averaged)
        average = get_ema_multi_avg_fn(min(self.decay, (1 + updates) / (10 + updates)) if updates else 0.0)
        pairs = list(zip(_tensors(self._average_model.module), _tensors(pl_module), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        average(*map(list, zip(*floats, strict=True)), updates)
        # Batch norm counts its batches; torch would average each count in four operations.
        if counts := [pair for pair in pairs if not pair[0].is_floating_point()]:
            torch._foreach_copy_([mine for mine, _ in counts], [theirs for _, theirs in counts])
        self._average_model.n_averaged += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
