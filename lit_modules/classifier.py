"""One LightningModule for every network: loss, metrics, optimiser, schedule."""

import hashlib
import math
import os
import warnings
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lit_modules.mean_loss import MeanLoss

# A batch that only fills up a process's share of an evaluation set carries this label, and no metric counts it.
IGNORED_LABEL = -100


class LitClassifier(pl.LightningModule):
    """Trains `net` to classify images with cross entropy.

    Args:
        net: Network from images (N, C, H, W) to logits (N, `num_classes`).
        optimizer: Called with the parameters; any class of `torch.optim`.
        scheduler: Called with the optimiser. An argument `total_steps`, `T_max` or `total_iters` left at None or -1
            becomes the length of the run, counted in `scheduler_interval`.
        scheduler_interval: Whether the scheduler moves after each optimiser step or each epoch.
        label_smoothing: Share of the target spread evenly over all classes (Szegedy et al. 2015, arXiv:1512.00567).
        initialization: "default" keeps PyTorch's; "he" draws the weights of convolutions and linear layers from
            N(0, 2 / fan_in) and clears the biases (He et al. 2015, arXiv:1502.01852).
        channels_last: Store images and weights as NHWC, which the convolutions of most devices prefer.
        compile: Compile the network with `torch.compile`.
        num_classes: Number of classes, for the metrics.

    Raises:
        ValueError: If the optimiser refuses its settings, or one of them is not finite.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["step", "epoch"] = "epoch",
        label_smoothing: float = 0.0,
        initialization: Literal["default", "he"] = "default",
        channels_last: bool = True,
        compile: bool = False,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        # Kept whole, network included, so that load_from_checkpoint(path) rebuilds it without arguments.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attribute 'net' is an instance of `nn.Module`")
            self.save_hyperparameters(logger=False)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
        _check_optimizer(optimizer)
        self.net = net
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.temperature = 1.0  # fitted by callbacks/temperature.py
        if initialization == "he":
            net.apply(_he_initialization)
        if channels_last:
            net.to(memory_format=torch.channels_last)
        if compile:
            net.compile()  # in place, so that checkpoints keep the plain parameter names
        metrics = nn.ModuleDict({stage: _metrics(num_classes) for stage in ("train_", "val", "test")})
        self.metrics = cast("dict[str, MetricCollection]", metrics)
        self._since_last_log: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), scaled and resized as in training, to logits (N, num_classes)."""
        if self.hparams["compile"]:
            # One compilation serves all batch sizes: an epoch's last batch, and evaluation.
            torch._dynamo.maybe_mark_dynamic(images, 0)
        return self.net(images.to(self.dtype))  # not float32 where --precision is, for one, bf16-true

    def setup(self, stage: str) -> None:
        """Sum losses in double precision, so that the split into batches and processes does not show."""
        if self.trainer.strategy.root_device.type != "mps":  # which has no float64
            for metrics in self.metrics.values():
                metrics["loss"].set_dtype(torch.float64)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Derive all that a training step draws (augmentation, dropout) from seed, epoch, batch and process.

        So a run that is stopped and continued draws what the uninterrupted run would have drawn, and no state of a
        random generator need be stored.
        """
        if self.trainer.training:
            _seed_device(
                self.trainer.strategy.root_device,
                step_seed(self.trainer.current_epoch, self.trainer.fit_loop.batch_idx + 1, self.global_rank),
            )
        return batch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of one batch; the metrics are updated only every `log_every_n_steps` batches."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.hparams["label_smoothing"])
        self._since_last_log.append((loss.detach(), logits.detach(), labels))
        if len(self._since_last_log) >= self.trainer.log_every_n_steps:  # type: ignore[attr-defined]  # set by its logger connector
            self.log("train/loss_step", self._update_train_metrics(), prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an epoch's last batch log its exact training loss and accuracy, as measured while it was training."""
        if self.trainer.is_last_batch:
            self._update_train_metrics()
            self._log_metrics("train_")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Update the validation metrics; returns the logits (N, num_classes), for callbacks."""
        return self._evaluation_step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log validation loss and accuracy."""
        self._log_metrics("val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Update the test metrics; returns the logits (N, num_classes), for callbacks."""
        return self._evaluation_step(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Log test loss and accuracy."""
        self._log_metrics("test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Calibrated class probabilities (N, num_classes) of one batch."""
        return self(batch[0]).float().div(self.temperature).softmax(dim=1)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Calibrated class probabilities, without a Trainer and whatever mode the network is in.

        Args:
            images: What the data module's `preprocess` returns, (N, C, H, W), on any device.

        Returns:
            Probabilities (N, num_classes) float32.
        """
        training = self.net.training
        self.net.eval()
        try:
            return self.predict_step((images.to(self.device), images), 0)
        finally:
            self.net.train(training)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the temperature."""
        checkpoint["temperature"] = self.temperature

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the temperature over; a checkpoint from elsewhere has none."""
        stored = checkpoint.get("temperature")
        self.temperature = stored if isinstance(stored, float) and 0 < stored < math.inf else 1.0

    def configure_optimizers(self) -> Any:
        """The optimiser, and the scheduler with the run's length worked out."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        interval = self.hparams["scheduler_interval"]
        total = self.trainer.estimated_stepping_batches if interval == "step" else self.trainer.max_epochs
        given = getattr(self.scheduler, "keywords", {})
        lengths = {name: total for name in ("total_steps", "T_max", "total_iters") if given.get(name, 0) in (None, -1)}
        schedule = {"scheduler": self.scheduler(optimizer, **lengths), "interval": interval, "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _evaluation_step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        images, labels = batch
        logits = self(images).float()
        counted = (labels != IGNORED_LABEL).sum()
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL)
        metrics = self.metrics[stage]
        metrics["loss"].update(loss, counted)
        metrics["accuracy"].update(logits, labels)
        return logits

    def _update_train_metrics(self) -> Tensor | float:
        """Move what was kept since the last call into the metrics; returns its mean loss."""
        if not self._since_last_log:
            return math.nan
        losses, logits, labels = zip(*self._since_last_log, strict=True)
        self._since_last_log.clear()
        metrics = self.metrics["train_"]
        counts = torch.tensor([len(batch) for batch in labels], device=losses[0].device)
        metrics["loss"].update(torch.stack(losses) * counts, counts)
        metrics["accuracy"].update(torch.cat(logits).float(), torch.cat(labels))
        return torch.stack(losses).mean()

    def _log_metrics(self, stage: str) -> None:
        for name, metric in self.metrics[stage].items():
            self.log(f"{stage.rstrip('_')}/{name}", metric, on_step=False, on_epoch=True, prog_bar=stage != "test")


def step_seed(epoch: int, batch_idx: int, rank: int) -> int:
    """Seed of one training step on one process, mixed from the run's seed and the three numbers."""
    run_seed = os.environ.get("PL_GLOBAL_SEED", "0")  # where seed_everything leaves it
    digest = hashlib.sha256(f"{run_seed} {epoch} {batch_idx} {rank}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _seed_device(device: torch.device, seed: int) -> None:
    # Not torch.manual_seed, which at each step would format a stack trace for every kind of accelerator that is absent.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _metrics(num_classes: int) -> MetricCollection:
    accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED_LABEL, validate_args=False)
    return MetricCollection({"loss": MeanLoss(), "accuracy": accuracy}, compute_groups=False)


def _check_optimizer(optimizer: OptimizerCallable) -> None:
    """Build the optimiser once on a stand-in parameter, so that bad settings are named before anything runs."""
    for name, value in optimizer([nn.Parameter(torch.zeros(1, 1))]).defaults.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"optimizer {name}={value} must be a finite number")


def _he_initialization(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
