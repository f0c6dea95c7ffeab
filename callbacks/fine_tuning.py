"""Fine-tuning: the convolutions stay frozen until the new layers have settled, then train at a lower rate."""

import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim import Optimizer

from errors import UserError, one_line


class FreezeFeatures(Callback):
    """Keeps `net.features` as it is for some epochs, then trains it at a share of the learning rate.

    Frozen means a fixed function: no gradients, and batch normalisation uses its stored statistics and keeps them.

    Unlike Lightning's `BaseFinetuning`, the optimiser has both groups of parameters from the start (it passes over
    those without a gradient). So the schedule scales both rates, and a checkpoint looks the same in both phases: a
    continued run needs only the epoch to know what trains. And the processes of a DDP group average the gradients of
    what was unfrozen: DDP permanently ignores what is frozen when it wraps a network, so the network is wrapped again.

    Args:
        epochs: Number of epochs, from the first, in which the features are frozen; 0 freezes nothing.
        lr_factor: The features' learning rate, as a share of the others'.

    Raises:
        ValueError: If an argument is out of range.
        UserError: When training begins, if the network has no part called `features`, or nothing to train beside it;
            if the processes share the network in some way other than DDP; if the optimiser takes a single rate (LBFGS),
            or the schedule sets both itself (OneCycleLR, CyclicLR).

    Source: the layer-wise rates of Yosinski et al. 2014 (arXiv:1411.1792) and Howard & Ruder 2018 (arXiv:1801.06146).
    """

    def __init__(self, epochs: int = 2, lr_factor: float = 0.1) -> None:
        if epochs < 0:
            raise ValueError(f"FreezeFeatures: epochs={epochs} must be at least 0")
        if not 0 < lr_factor <= 1:
            raise ValueError(f"FreezeFeatures: lr_factor={lr_factor} must lie above 0 and not above 1")
        self._epochs = epochs
        self._lr_factor = lr_factor
        self._features = nn.Module()
        self._frozen = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze, and give the optimiser two rates, before it is made and DDP wraps the network."""
        if stage != "fit":
            return
        self._features = getattr(pl_module.net, "features", None)  # type: ignore[assignment]
        if not isinstance(self._features, nn.Module):
            problem = f"{type(pl_module.net).__name__} has no part called features to freeze"
        elif trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
            problem = f"frozen features need --trainer.strategy ddp, not {type(trainer.strategy).__name__}"
        else:
            classifier: Any = pl_module
            plain = getattr(classifier.optimizer, "plain", classifier.optimizer)  # of an earlier fit
            classifier.optimizer = _two_rates(plain, self._features, self._lr_factor)
            self._frozen = self._epochs > 0
            self._features.requires_grad_(not self._frozen)
            problem = _problem(classifier)
        if problem:
            raise UserError(problem if trainer.is_global_zero else "")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a schedule that sets both rates itself; a continued run may begin within an epoch of either phase."""
        rates = [group["initial_lr"] for group in trainer.optimizers[0].param_groups if "initial_lr" in group]
        if rates and not math.isclose(rates[1], rates[0] * self._lr_factor, rel_tol=1e-6):
            problem = "the schedule gives the features the others' learning rate: take one that has no max_lr"
            raise UserError(problem if trainer.is_global_zero else "")
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Unfreeze the features when it is time."""
        if not self._frozen:
            return
        if trainer.current_epoch < self._epochs:
            self._features.eval()
            return
        self._frozen = False
        self._features.train().requires_grad_(True)
        strategy: Any = trainer.strategy
        if isinstance(strategy, DDPStrategy):
            strategy.model = pl_module
            strategy.configure_ddp()


def _problem(classifier: Any) -> str:
    """Why a classifier can't train in this way; empty if it can."""
    if not any(weight.requires_grad for weight in classifier.parameters()):
        net = type(classifier.net).__name__
        return f"{net} has no weights but its features, so none is left to train: leave FreezeFeatures out"
    try:
        classifier.optimizer([nn.Parameter(torch.zeros(1, 1))])
    except Exception as error:  # of a class from anywhere
        return f"FreezeFeatures sets two rates: {one_line(str(error))}; take another optimizer, such as AdamW"
    return ""


def _two_rates(optimizer: OptimizerCallable, features: nn.Module, factor: float) -> OptimizerCallable:
    """The same optimiser with a group of parameters for the features, at another rate."""
    own = {id(parameter) for parameter in features.parameters()}

    def make(parameters: Iterable) -> Optimizer:
        groups: dict[bool, list] = {False: [], True: []}
        for parameter in parameters:
            groups[id(parameter) in own].append(parameter)
        made = optimizer(
            [{"params": groups[False], "name": "classifier"}, {"params": groups[True], "name": "features"}]
        )
        made.param_groups[1]["lr"] *= factor
        return made

    make.plain = optimizer  # type: ignore[attr-defined]
    return make
