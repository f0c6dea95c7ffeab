"""The most confident mistakes explained by LayerCAM, in TensorBoard."""

import importlib.util
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import nn

from callbacks.confusion import Confusion
from callbacks.tensorboard.pictures import show, writes
from errors import UserError
from pictures.mistakes import explain_mistakes

COUNT = 8  # mistakes


class MistakesExplained(Callback):
    """Shows which parts misled the network: once after training, for validation images, and once after testing.

    Captum, which computes it, is an optional package; without it, and for a network without feature maps, nothing is
    shown. Weights, gradients and random generators stay as they are.

    Args:
        confusion: The callback that finds the mistakes.
    """

    def __init__(self, confusion: Confusion) -> None:
        self._confusion = confusion
        self._validated = -1  # step of the last validation

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note which weights made the mistakes."""
        self._validated = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Explain the mistakes of the last validation, unless training continued after it."""
        if self._validated == trainer.global_step:
            self._explain(trainer, pl_module, "validation", trainer.global_step - 1)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Explain the mistakes of the test."""
        self._explain(trainer, pl_module, "test", trainer.global_step)

    def _explain(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, step: int) -> None:
        mistakes = self._confusion.mistakes[:COUNT]
        if not (writes(trainer) and mistakes and importlib.util.find_spec("captum")):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        images = (data.val_set if stage == "validation" else data.test_set).images
        chosen = images[[mistake.image for mistake in mistakes]]
        net: nn.Module = pl_module.net  # type: ignore[assignment]
        try:
            sheet = explain_mistakes(net, data, chosen, mistakes, self._confusion.class_names)
        except UserError:
            return  # no feature maps
        # 256 colours are enough, and take some 40 KB in the log instead of 80.
        small = sheet.quantize(256, dither=Image.Dither.NONE)
        show(trainer, f"errors/most_confident_explained_{stage}", small, step)
