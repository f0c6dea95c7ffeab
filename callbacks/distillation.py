"""Distillation: a small network learns from the predictions of a better one, its teacher."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from filelock import FileLock
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F

from checkpoints.reading import read_checkpoint
from checkpoints.writing import AtomicCheckpointIO
from datamodules import FashionMNISTDataModule
from datamodules.batches import ImageTensors
from errors import RunError, UserError
from lit_modules import LitClassifier
from weights import WEIGHTS
from weights.trained import load_trained, logits_of


class Distillation(Callback):
    """Trains on a teacher's probabilities instead of the labels (Hinton et al. 2015, arXiv:1503.02531).

    Before the first epoch the teacher sees each training image once, and its mirror if it was trained with mirrors; its
    logits are kept in `data_dir`/cache for the next run.
    The targets are softmax(mean logits / temperature), however an image is augmented. With `consistent` the teacher is
    asked about the images as they are augmented: the more to learn from the longer one trains (Beyer et al. 2021,
    arXiv:2106.05237). If Fashion-MNIST's are shifted and mirrored alone, it sees them in every place before the first
    epoch, as long as that is less work than to ask it in each step. Training accuracy counts how often both networks
    prefer the same class; validation and test count the labels as always.

    A teacher that was trained on the validation images passes on what it knows of them, and makes validation accuracy
    too high: leave out the same ones (`data.split_seed`, `data.val_size`).

    Args:
        teacher: A network in `weights/`, such as "vgg11_quarter", or the path of a checkpoint; to continue a run that
            names a path takes --trust_checkpoint.
        temperature: Above 1 the targets say more about how alike the other classes are.
        consistent: Ask the teacher about the augmented images.

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
        self._known: KnownAnswers | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replace the labels of the training images; later hooks come after Lightning has made the loader."""
        if stage != "fit":
            return
        named = {path.stem: path for path in WEIGHTS.glob("*.ckpt")}
        path = named.get(self.teacher, Path(self.teacher))
        try:
            teacher, its_data, _ = load_trained(path)
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
        images = data.train_set.images
        self._asked = teacher.to(trainer.strategy.root_device), its_data
        if self.consistent:
            targets = torch.full((len(images), len(data.class_names)), torch.nan)  # until `on_train_batch_start`
            places = _places(data, its_data)
            if 0 < 2 * len(places) <= (trainer.max_epochs or 0):
                logits = self._logits(path, data, images, places)
                self._known = KnownAnswers(images, places, logits, trainer.strategy.root_device)
        else:
            targets = self._logits(path, data, images, [(0, 0)])[0].div(self.temperature).softmax(dim=1)
            self._asked = None
        data.train_set = ImageTensors(images, data.train_set.labels, targets)

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
        logits = self._known(pixels) if self._known else None
        if logits is None:
            views = (pixels, pixels.flip(-1)) if its_data.hparams.get("horizontal_flip") else (pixels,)
            with trainer.precision_plugin.forward_context():
                logits = torch.stack([teacher(its_data.as_seen(view)).float() for view in views]).mean(dim=0)
        targets.copy_(logits.div(self.temperature).softmax(dim=1))

    def _logits(
        self, path: Path, data: FashionMNISTDataModule, images: Tensor, places: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The logits (places, N, classes) of uint8 images (N, C, H, W), if need be asked for and kept."""
        assert self._asked is not None
        teacher, its_data = self._asked
        mirror = bool(its_data.hparams.get("horizontal_flip"))

        def ask() -> Tensor:
            where = f" in {len(places)} places" if len(places) > 1 else ""
            print(f"Asking the teacher {self.teacher} about {len(images):,} images{where}", flush=True)
            views = (moved(images, *place) for place in places)
            return torch.stack([logits_of(teacher, its_data, view, mirror, bar="Teacher") for view in views])

        digest = hashlib.sha256(path.read_bytes())
        digest.update(images.numpy().tobytes())
        digest.update(repr(places).encode() if len(places) > 1 else b"")
        kept = data.data_dir / "cache" / f"teacher-{digest.hexdigest()[:32]}.pt"
        logits = None
        with suppress(OSError, RunError):  # a folder that can't be written
            kept.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(kept.with_suffix(".lock")):  # of several processes the first one asks
                try:
                    logits = read_checkpoint(kept)["state_dict"]["logits"]
                except (UserError, KeyError):  # not asked yet, or the file is damaged
                    logits = ask()
                    AtomicCheckpointIO().save_checkpoint({"state_dict": {"logits": logits}}, kept)
        return (ask() if logits is None else logits).view(len(places), len(images), -1)


class KnownAnswers:
    """A teacher's logits, found by the pixels of an image, or of its mirror image.

    Args:
        images: Uint8 images (N, C, H, W).
        places: Shifts down and to the right.
        logits: Those of each image in each place (places, N, classes).
        device: Where they are asked for.
    """

    def __init__(self, images: Tensor, places: Sequence[tuple[int, int]], logits: Tensor, device: torch.device) -> None:
        self._random = torch.randint(2**62, images[0].shape, generator=torch.Generator().manual_seed(0))
        views = [view for place in places for view in (moved(images, *place), moved(images, *place).flip(-1))]
        keys, order = torch.cat([self._key(part) for view in views for part in view.split(1000)]).sort()
        rows = torch.arange(len(places) * len(images)).view(len(places), 1, -1).expand(-1, 2, -1).flatten()[order]
        self._keys, self._rows, self._logits = keys.to(device), rows.to(device), logits.flatten(0, 1).to(device)
        self._random = self._random.to(device)

    def __call__(self, pixels: Tensor) -> Tensor | None:
        """The logits (N, classes) of pixels (N, C, H, W) in 0..1; None if an image is not among those known."""
        keys = self._key((pixels * 255).round())
        found = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
        return self._logits[self._rows[found]] if torch.equal(self._keys[found], keys) else None

    def _key(self, images: Tensor) -> Tensor:
        """A number for each image (N,), all but certainly its own."""
        return (images.long() * self._random).sum(dim=(1, 2, 3))


def moved(images: Tensor, down: int, right: int) -> Tensor:
    """Images (N, C, H, W), shifted by whole pixels; zeros come in."""
    return F.pad(images, (right, -right, down, -down))


def _places(data: FashionMNISTDataModule, of_teacher: FashionMNISTDataModule) -> list[tuple[int, int]]:
    """Where augmentation may shift the images; none if it also does what would change the teacher's answer."""
    settings = data.hparams
    if type(data) is not FashionMNISTDataModule or data.image_size != data.train_set.images.shape[-1]:
        return []
    others = any(settings[name] for name in ("random_erasing", "brightness", "contrast"))
    if others or (settings["horizontal_flip"] and not of_teacher.hparams.get("horizontal_flip")):
        return []
    shifts = range(-settings["crop_padding"], settings["crop_padding"] + 1)
    return list(product(shifts, shifts))
