"""A learning-rate schedule that scales the optimiser's own rate, so that `--lr` keeps its meaning."""

import math
from collections.abc import Callable
from inspect import signature
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupDecay(LambdaLR):
    """Linear warm-up from zero to the optimiser's learning rate, then a cosine or linear decay to zero.

    Unlike `OneCycleLR` it takes the peak rate from the optimiser and leaves the momentum alone.

    Args:
        optimizer: The optimiser whose learning rates are scaled.
        total_steps: Length of the run in scheduler steps; -1 lets `LitClassifier` fill in the run's length.
        warmup: Share of the steps spent warming up, from 0 (none) to 1.
        shape: Form of the decay.
        final: Learning rate at the end, as a share of the peak.

    Raises:
        ValueError: If `warmup` or `final` lies outside 0..1.

    Source: the linear warm-up of Goyal et al. 2017 (arXiv:1706.02677), the cosine of Loshchilov & Hutter 2016
    (arXiv:1608.03983).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int = -1,
        warmup: float = 0.1,
        shape: Literal["cosine", "linear"] = "cosine",
        final: float = 0.0,
    ) -> None:
        if not 0 <= warmup <= 1 or not 0 <= final <= 1:
            raise ValueError(f"warmup={warmup} and final={final} must lie between 0 and 1")
        warmup_steps = warmup * total_steps

        def factor(step: int) -> float:
            # The first step already moves: (step + 1) keeps its rate above zero.
            if step + 1 <= warmup_steps:
                return (step + 1) / warmup_steps
            progress = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
            left = 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
            return final + (1 - final) * left

        super().__init__(optimizer, factor)


def open_lengths(scheduler: Callable) -> list[str]:
    """The arguments of a schedule that stand for the length of the run: those left at None or -1."""
    parameters, given = signature(scheduler).parameters, getattr(scheduler, "keywords", {})
    given = {name: parameter.default for name, parameter in parameters.items()} | given
    return [name for name in ("total_steps", "T_max", "total_iters") if given.get(name, 0) in (None, -1)]


def of_length(scheduler: Callable, optimizer: Optimizer, total: int | float) -> Any:
    """The schedule of an optimiser, `total` steps or epochs long where its length was left open."""
    if (arguments := open_lengths(scheduler)) and not 0 <= total < math.inf:
        raise ValueError(f"the schedule is as long as the run, which has no end: give max_epochs, or {arguments[0]}")
    return scheduler(optimizer, **dict.fromkeys(arguments, total))
