"""The curve of the search for a learning rate, as JSON, and as a picture where matplotlib is installed."""

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from callbacks.run_folder import RunFolder
from errors import MissingPackage, shown


class Curve(NamedTuple):
    """What a search measured.

    Attributes:
        learning_rate: The rate to take, with three significant digits.
        rates: Learning rate of each step.
        losses: Training loss of each step, smoothed; NaN where it was not finite.
    """

    learning_rate: float
    rates: list[float]
    losses: list[float]


class LearningRateCurve(Callback):
    """Writes `lr_finder.json` and `lr_finder.png` into the run's folder when training begins.

    Args:
        curve: What was measured; None on processes that only received the rate.
        folder: The run's folder.
    """

    def __init__(self, curve: Curve | None, folder: RunFolder) -> None:
        self._curve = curve
        self._folder = folder

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the files, and say where they are."""
        folder = self._folder.path
        if not trainer.is_global_zero or folder is None or self._curve is None:
            return
        target = folder / "lr_finder.json"
        target.write_text(json.dumps(self._curve._asdict(), indent=1) + "\n", encoding="utf-8")
        picture = target.with_suffix(".png")
        try:
            plot(self._curve, picture)
            print(f"Curve of the learning rates: {shown(picture)}", flush=True)
        except ImportError:
            hint = MissingPackage("a picture needs", "matplotlib")
            print(f"Curve of the learning rates: {shown(target)} ({hint})", flush=True)


def plot(curve: Curve, path: Path) -> None:
    """Draw the loss against the learning rate, from where it moves; the lowest point and the rate taken are marked.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # an optional dependency

    losses = [loss if math.isfinite(loss) else math.inf for loss in curve.losses]
    lowest = losses.index(min(losses))
    # At tiny rates, where most steps are, nothing happens: drawn is what comes after, from eight steps before.
    level = statistics.median(losses[: lowest + 1])
    flat = losses[lowest] + 0.95 * (level - losses[lowest])
    begins = max((step for step in range(lowest) if losses[step] >= flat), default=0)
    first = max(0, min(begins, sum(rate < curve.learning_rate for rate in curve.rates)) - 8)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.rates[first:], curve.losses[first:], color="#0072B2")
    axes.plot(
        curve.rates[lowest], losses[lowest], "o", color="#0072B2", label=f"lowest loss: {curve.rates[lowest]:.3g}"
    )
    axes.axvline(curve.learning_rate, color="#D55E00", linestyle="--", label=f"taken: {curve.learning_rate:g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, smoothed")
    fall = level - losses[lowest]
    axes.set_ylim(losses[lowest] - 0.1 * fall, level + 0.4 * fall)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    figure.savefig(path, dpi=110)
