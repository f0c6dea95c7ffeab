"""Class weights in the loss: a class of few images counts as much as one of many."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback


class ClassWeights(Callback):
    """Gives `LitClassifier` the weight of each class: images / (classes * images of that class), 0 for one without.

    These are scikit-learn's "balanced" weights; their mean over the training images is 1.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the training images of each class."""
        labels = trainer.datamodule.train_set.labels.cpu()  # type: ignore[attr-defined]
        counts = labels.bincount(minlength=pl_module.hparams["num_classes"])
        weights = torch.where(counts > 0, len(labels) / (len(counts) * counts.clamp(min=1)), 0.0)
        pl_module.class_weights = weights.to(pl_module.device, pl_module.dtype)  # type: ignore[arg-type]  # never a text
