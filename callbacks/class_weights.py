"""Class weights in the loss: a class of few images counts as much as one of many."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F


class ClassWeights(Callback):
    """Gives `LitClassifier` the weight of each class: images / (classes * images of that class), 0 for one without.

    These are scikit-learn's "balanced" weights; their mean over the training images is 1.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the training images of each class."""
        labels = trainer.datamodule.train_set.labels.cpu()  # type: ignore[attr-defined]
        counts = labels.bincount(minlength=pl_module.hparams["num_classes"])
        weights = torch.where(counts > 0, len(labels) / (len(counts) * counts.clamp(min=1)), 0.0)
        weights = weights.to(pl_module.device, pl_module.dtype)  # type: ignore[arg-type]  # never a text
        classifier: Any = pl_module
        classifier.loss_function = partial(weighted_cross_entropy, weights)


def weighted_cross_entropy(weights: Tensor, logits: Tensor, targets: Tensor, **settings: Any) -> Tensor:
    """Cross entropy averaged over the images, each with the weight of its class.

    PyTorch's own `weight` multiplies the terms of a target instead. With smoothed or mixed targets, or a teacher's,
    most of an image's loss could then belong to a rare class that it is not of, and the network would predict that.

    Args:
        weights: Weight of each class (C,).
        logits: (N, C).
        targets: Labels (N,), or probabilities (N, C); the weight of the latter is the mean over the classes.
        settings: More for `torch.nn.functional.cross_entropy`.
    """
    losses = F.cross_entropy(logits, targets, reduction="none", **settings)
    each = weights[targets] if targets.dim() == 1 else (targets * weights).sum(dim=1)
    return (losses * each).sum() / each.sum()
