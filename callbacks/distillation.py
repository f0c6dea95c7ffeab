"""Distillation: a small network learns from the predictions of a better one, its teacher."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from checkpoints.reading import read_checkpoint
from checkpoints.writing import AtomicCheckpointIO
from datamodules import FashionMNISTDataModule
from datamodules.batches import ImageTensors
from datamodules.files.finding import locked
from errors import RunError, UserError, print_warning
from lit_modules import LitClassifier
from weights import WEIGHTS
from weights.trained import OWN_CLASS, load_trained, logits_of, may_know


class Distillation(Callback):
    """Trains on a teacher's probabilities instead of the labels (Hinton et al. 2015, arXiv:1503.02531).

    Before the first epoch the teacher sees each training image once, and its mirror if it was trained with mirrors; its
    logits are kept in `data_dir`/cache for the next run.
    The targets are softmax(mean logits / temperature), however an image is augmented. With `consistent` the teacher is
    asked in each step instead, about the images as they are augmented in it: more work, and the more to learn from the
    longer one trains (Beyer et al. 2021, arXiv:2106.05237). Training accuracy counts how often both networks prefer the
    same class; validation and test count the labels as always.

    A teacher that was trained on the validation images passes on what it knows of them, and makes validation accuracy
    too high: leave out the same ones (`data.split_seed`, `data.val_size`).

    Args:
        teacher: A network in `weights/`, such as "vgg11_quarter", or the path of a checkpoint; to continue a run that
            names a path takes --trust_checkpoint.
        temperature: Above 1 the targets say more about how alike the other classes are.
        consistent: Ask the teacher about the augmented images, in each step.

    Raises:
        ValueError: If the temperature is not above 0.
        UserError: When training begins, if the teacher can't be read or knows other classes, or if the recipe has what
            needs labels: mixup, cutmix, `data.photographed`.
    """

    def __init__(self, teacher: str, temperature: float = 4.0, consistent: bool = False) -> None:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"Distillation: temperature={temperature} must be a positive number")
        self.teacher = teacher
        self.temperature = temperature
        self.consistent = consistent
        self._asked: tuple[LitClassifier, FashionMNISTDataModule] | None = None  # in each step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replace the labels of the training images; later hooks come after Lightning has made the loader."""
        if stage != "fit":
            return
        named = {path.stem: path for path in WEIGHTS.glob("*.ckpt")}
        path = named.get(self.teacher, Path(self.teacher))
        try:
            teacher, its_data, _ = load_trained(path, how=OWN_CLASS)
        except UserError as error:
            hint = f"give a checkpoint, or one of {', '.join(sorted(named))}"
            raise UserError(f"no teacher: {error}; {hint}" if trainer.is_global_zero else "") from None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        classifier: Any = pl_module
        problem = ""
        if tuple(its_data.class_names) != tuple(data.class_names):
            both = [", ".join(classes) for classes in (its_data.class_names, data.class_names)]
            problem = f"the teacher {self.teacher} was trained on other classes, {both[0]}; these are {both[1]}"
        elif classifier.mix is not None or data.hparams.get("photographed"):
            problem = "mixup, cutmix and data.photographed need labels; leave them out, or the teacher"
        if problem:
            raise UserError(problem if trainer.is_global_zero else "")
        if may_know(its_data.hparams, data.hparams) and trainer.is_global_zero:
            print_warning(f"the teacher {self.teacher} may have been trained on validation images, which then flatter")
        images = data.train_set.images
        if self.consistent:
            self._asked = teacher.to(trainer.strategy.root_device), its_data
            unknown = torch.full((len(images), len(data.class_names)), torch.nan)  # until `on_train_batch_start`
            data.train_set = ImageTensors(images, data.train_set.labels, unknown)
            return
        digest = hashlib.sha256(path.read_bytes())
        digest.update(images.numpy())
        kept = data.data_dir / "cache" / f"teacher-{digest.hexdigest()[:32]}.pt"
        logits = None
        with suppress(OSError, RunError):  # a folder that can't be written
            kept.parent.mkdir(parents=True, exist_ok=True)
            with locked(kept.with_suffix(".lock")):  # of several processes the first one asks
                try:
                    logits = read_checkpoint(kept)["state_dict"]["logits"]
                except (UserError, KeyError):  # not asked yet, or the file is damaged
                    logits = self._ask(teacher.to(trainer.strategy.root_device), its_data, images)
                    AtomicCheckpointIO().save_checkpoint({"state_dict": {"logits": logits}}, kept)
        if logits is None:
            logits = self._ask(teacher.to(trainer.strategy.root_device), its_data, images)
        targets = logits.div(self.temperature).softmax(dim=1)
        data.train_set = ImageTensors(images, data.train_set.labels, targets)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the training images their labels back."""
        if stage == "fit":
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            data.train_set = ImageTensors(data.train_set.images, data.train_set.labels)
            self._asked = None

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the teacher's probabilities into the batch's targets."""
        if self._asked is None:
            return
        (teacher, its_data), (images, targets) = self._asked, batch
        own = trainer.datamodule.hparams  # type: ignore[attr-defined]
        pixels = images.float() * own["std"] + own["mean"]
        if type(its_data) is FashionMNISTDataModule:
            pixels = pixels[:, :1]  # all channels are the same
        with trainer.precision_plugin.forward_context():
            logits = teacher(its_data.as_seen(pixels))
        targets.copy_(logits.float().div(self.temperature).softmax(dim=1))

    def _ask(self, teacher: LitClassifier, its_data: FashionMNISTDataModule, images: torch.Tensor) -> torch.Tensor:
        """The logits (N, classes) of uint8 images (N, C, H, W)."""
        print(f"Asking the teacher {self.teacher} about {len(images):,} images", flush=True)
        mirror = bool(its_data.hparams.get("horizontal_flip"))
        return logits_of(teacher, its_data, images, mirror, bar="Teacher")
