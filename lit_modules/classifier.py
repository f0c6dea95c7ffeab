"""One LightningModule for every network: loss, metrics, optimiser, schedule."""

import math
import warnings
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from checkpoints.loading import CheckedLoading
from checkpoints.plain import plain_settings
from checkpoints.state import check_state
from lit_modules.execution.activation_checkpointing import apply_activation_checkpointing
from lit_modules.execution.compilation import prepare
from lit_modules.execution.mixing import mixing
from lit_modules.execution.out_of_distribution import OutOfDistribution
from lit_modules.execution.seeding import seed_step
from lit_modules.initialization import he_initialization, start_output
from lit_modules.metrics import StageMetrics
from lit_modules.schedules import of_length


class LitClassifier(CheckedLoading, pl.LightningModule):
    """Trains `net` to classify images with cross entropy.

    Args:
        net: Network from images (N, C, H, W) to logits (N, `num_classes`).
        optimizer: Called with the parameters; any class of `torch.optim`, or `optimizers.muon.Muon`.
        scheduler: Called with the optimiser. An argument `total_steps`, `T_max` or `total_iters` left at None or -1
            becomes the length of the run, counted in `scheduler_interval`.
        scheduler_interval: Whether the scheduler moves after each optimiser step or each epoch.
        label_smoothing: Share of the target spread evenly over all classes (Szegedy et al. 2015, arXiv:1512.00567).
        mixup: Blend training images and targets with those of another image, by a share drawn for each batch from
            Beta(mixup, mixup); 0 is off (Zhang et al. 2017, arXiv:1710.09412). Training accuracy then counts the label
            with the larger share.
        cutmix: The same with a rectangle pasted (Yun et al. 2019, arXiv:1905.04899); with both, each batch draws one.
        flip_test: Also test logits averaged over each image and its mirror (`test/loss_flip`, `test/accuracy_flip`).
        initialization: "default" keeps PyTorch's; "he" draws the weights of convolutions and linear layers from
            N(0, 2 / fan_in) and clears the biases (He et al. 2015, arXiv:1502.01852).
        output_bias: With "he", start the last layer with zero weights and this bias, so that no class is ahead at
            first. If a ReLU follows that layer, as in NiN, it must be positive, or no class gets a gradient.
        channels_last: Store images and weights as NHWC, which the convolutions of most devices prefer.
        compile: Compile the network with `torch.compile`; a name is its mode (execution/compilation.py).
        checkpoint_activations: Keep less memory and compute more, with equal gradients (activation_checkpointing.py).
        num_classes: Number of classes, for the metrics.

    Raises:
        ValueError: If the optimiser refuses its settings, one of them is not finite, or two contradict each other.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["step", "epoch"] = "epoch",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        flip_test: bool = False,
        initialization: Literal["default", "he"] = "default",
        output_bias: float | None = None,
        channels_last: bool = True,
        compile: bool | Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = False,
        checkpoint_activations: bool = False,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        # Kept whole, network included, so that load_from_checkpoint(path) rebuilds it without arguments.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attribute 'net' is an instance of `nn.Module`")
            self.save_hyperparameters(logger=False)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
        if output_bias is not None and not math.isfinite(output_bias):
            raise ValueError(f"output_bias={output_bias} must be a finite number")
        if compile and checkpoint_activations:
            raise ValueError("checkpoint_activations and compile can't be combined; leave one of them out")
        _check_optimizer(optimizer)
        self.net, self.optimizer, self.scheduler = net, optimizer, scheduler
        self.mix = mixing(num_classes, mixup=mixup, cutmix=cutmix)
        self.temperature = 1.0  # fitted by callbacks/temperature.py
        self.out_of_distribution: OutOfDistribution | None = None  # fitted by callbacks/out_of_distribution.py
        self.loss_function: Any = F.cross_entropy  # or that of callbacks/class_weights.py
        if initialization == "he":
            net.apply(he_initialization)
            if output_bias is not None:
                start_output(net, output_bias)
        if channels_last:
            net.to(memory_format=torch.channels_last)
        if checkpoint_activations:
            apply_activation_checkpointing(net)
        self._call = prepare(net, compile)
        stages = ("train_", "val", "test", *(["test_flip"] if flip_test else []))
        self.metrics: Any = nn.ModuleDict({stage: StageMetrics(stage, num_classes) for stage in stages})
        self._since_last_log: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), scaled and resized as in training, to logits (N, num_classes)."""
        if not images.is_floating_point():
            raise ValueError(f"the images are {images.dtype}; give Trainer the data module, or use its preprocess")
        return self._call(self.net, images.to(self.dtype))  # not float32 with --precision bf16-true, for example

    def on_fit_start(self) -> None:
        """Forget what an interrupted run has counted; sum losses in double precision, however batches are split."""
        for stage, metrics in self.metrics.items():
            # In `setup` it would be undone: for `--precision bf16-true` Lightning converts the module after that.
            if self.trainer.strategy.root_device.type != "mps":  # which has no float64
                metrics["loss"].set_dtype(torch.float64)
            if stage != "train_" or self.trainer.training:  # not where validation interrupts an epoch
                metrics.reset()
        if self.trainer.training:
            self._since_last_log.clear()

    on_validation_start = on_test_start = on_fit_start

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Derive all random numbers of a training step (augmentation, dropout) from seed, epoch, batch and process."""
        if (now := self.trainer).training:
            seed_step(now.strategy.root_device, now.current_epoch, now.fit_loop.batch_idx + 1, self.global_rank)
        return batch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of one batch; the metrics are updated only every `log_every_n_steps` steps."""
        images, targets = batch  # labels (N,), or probabilities (N, num_classes) from a teacher
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        labels = targets if targets.dim() == 1 else targets.argmax(dim=1)
        logits = self(images)
        loss = self.loss_function(logits, targets, label_smoothing=self.hparams["label_smoothing"])
        self._since_last_log.append((loss.detach(), logits.detach(), labels))
        if not self.trainer.fit_loop._should_accumulate() and self.trainer._logger_connector.should_update_logs:
            # Lightning reads what it shows in a bar at every step, and waits for the device to do so.
            shown = isinstance(self.trainer.progress_bar_callback, TQDMProgressBar | RichProgressBar)
            self.log("train/loss_step", self._update_train_metrics(), prog_bar=shown)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an epoch's last batch, log its exact training loss and accuracy, as measured during training."""
        if self.trainer.is_last_batch or self.trainer.fit_loop.epoch_loop.done:
            self.log_train_metrics()

    def log_train_metrics(self) -> None:
        """Log the training loss and accuracy of the epoch so far."""
        self._update_train_metrics()
        self._log_metrics("train_")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Update the validation metrics; returns the logits (N, num_classes), for callbacks."""
        return self._evaluation_step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log validation loss and accuracy."""
        self._log_metrics("val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Update the test metrics; returns the plain logits (N, num_classes), for callbacks."""
        logits = self._evaluation_step(batch, "test")
        if self.hparams["flip_test"]:
            self.metrics["test_flip"].add((logits + self(batch[0].flip(-1)).float()) / 2, batch[1])
        return logits

    def on_test_epoch_end(self) -> None:
        """Log test loss and accuracy."""
        self._log_metrics("test")
        if self.hparams["flip_test"]:
            self._log_metrics("test_flip")

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> Tensor:
        """Calibrated class probabilities (N, num_classes) of one batch, with its labels or without."""
        return self(batch if isinstance(batch, Tensor) else batch[0]).float().div(self.temperature).softmax(dim=1)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Calibrated class probabilities (N, num_classes) float32, without a Trainer, whatever the network's mode.

        `images` (N, C, H, W) are what the data module's `preprocess` returns, on any device.
        """
        training = [layer for layer in self.net.modules() if layer.training]  # not the frozen ones
        self.net.eval()
        try:
            return self.predict_step(images.to(self.device), 0)
        finally:
            for layer in training:
                layer.training = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what was fitted, and only those hyperparameters that can be read without unpickling objects."""
        checkpoint["temperature"] = self.temperature
        checkpoint["out_of_distribution"] = self.out_of_distribution and self.out_of_distribution._asdict()
        stored = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if stored and "_instantiator" not in stored:  # from the user's own Trainer, with objects as arguments
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = plain_settings(stored)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check what a Trainer is about to restore against this run, and take over what was fitted, if there is."""
        if self._trainer is not None:
            check_state(checkpoint, self.trainer, self, of_length)
        stored = checkpoint.get("temperature")
        self.temperature = stored if isinstance(stored, float) and 0 < stored < math.inf else 1.0
        self.out_of_distribution = OutOfDistribution.stored(checkpoint, self.hparams["num_classes"])

    def configure_optimizers(self) -> Any:
        """The optimiser, and the scheduler with the run's length worked out."""
        optimizer = self.optimizer(self.parameters())
        # LBFGS views each gradient as a vector; Apple's GPUs have wrong gradients of channels last (pytorch #175189).
        if isinstance(optimizer, torch.optim.LBFGS) or self.device.type == "mps":
            self.net.to(memory_format=torch.contiguous_format)
        if self.scheduler is None:
            return optimizer
        interval, trainer = self.hparams["scheduler_interval"], self.trainer
        total = trainer.limit_train_batches and trainer.estimated_stepping_batches  # max_steps may have cut it short
        if interval == "epoch" and total:
            trainer.fit_loop.setup_data()  # which counts the batches
            total = -(-total // -(-trainer.num_training_batches // trainer.accumulate_grad_batches))
        schedule = of_length(self.scheduler, optimizer, cast("int", total))
        monitor = getattr(schedule, "monitor", "val/loss")
        plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) and not monitor.startswith("train/")
        when = {"interval": interval, "frequency": (plateau and trainer.check_val_every_n_epoch) or 1}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": monitor} | when}

    def _evaluation_step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        logits = self(batch[0]).float()
        self.metrics[stage].add(logits, batch[1])
        return logits

    def _update_train_metrics(self) -> Tensor | float:
        """Move what was kept since the last call into the metrics; returns its mean loss."""
        kept, self._since_last_log = self._since_last_log, []
        return self.metrics["train_"].add_trained(kept) if kept else math.nan

    def _log_metrics(self, stage: str) -> None:
        self.log_dict(self.metrics[stage], on_step=False, on_epoch=True, prog_bar=not stage.startswith("test"))


def _check_optimizer(optimizer: OptimizerCallable) -> None:
    """Build the optimiser once on a stand-in parameter, so that bad settings are named before anything runs."""
    for name, value in optimizer([nn.Parameter(torch.zeros(1, 1))]).defaults.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"optimizer {name}={value} must be a finite number")
