"""Mixup and cutmix: training images blended with others of their batch."""

import math

from torch import nn
from torchvision.transforms import v2


def mixing(num_classes: int, **alphas: float) -> nn.Module | None:
    """A layer from images and labels (N,) to mixed images and targets (N, num_classes); None if nothing is mixed."""
    kinds = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
    for name, alpha in alphas.items():
        if not 0 <= alpha < math.inf:
            raise ValueError(f"{name}={alpha} must be a finite number, at least 0")
    wanted = [kinds[name](alpha=alpha, num_classes=num_classes) for name, alpha in alphas.items() if alpha]
    return v2.RandomChoice(wanted) if wanted else None
