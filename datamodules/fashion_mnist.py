"""Fashion-MNIST as a LightningDataModule; images stay 28x28 bytes until they are on the device."""

import math
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, default_convert

from checkpoints.loading import CheckedLoading
from checkpoints.plain import plain_settings
from datamodules.augmentation import erase, jitter, shift_and_flip
from datamodules.batches import EvalBatches, ImageTensors, TrainBatches
from datamodules.files.finding import DatasetError, load, prepare, whole_below
from datamodules.files.grounds import photographed
from errors import expanded, leave_signals_to_main

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class FashionMNISTDataModule(CheckedLoading, pl.LightningDataModule):
    """Train, validation and test batches of images (N, channels, image_size, image_size) and labels (N,).

    The validation images are drawn from the 60,000 training images; the 10,000 official test images are used only
    by `test` and `predict`. Source of the data: Xiao et al. 2017, arXiv:1708.07747.

    Args:
        data_dir: Folder of the four files, raw or .gz; if missing, they are found or downloaded.
        batch_size: Training images per step on each device.
        image_size: Height and width of the images that the network sees, in pixels.
        val_size: Number of training images held out for validation; 0 trains on all.
        split_seed: Seed of the split into training and validation images.
        eval_batch_size: Images per step in validation, test and prediction; None takes `batch_size`.
        channels: 1, or 3 to repeat the grey channel for networks made for colour.
        mean: Subtracted from the pixels, which lie in 0..1 (0.2860 centres the training images).
        std: The pixels are divided by it afterwards (0.3530 scales the training images).
        crop_padding: Augmentation: shift each image by up to this many of its 28 pixels in both directions.
        horizontal_flip: Augmentation: mirror half of the images.
        brightness: Augmentation: multiply the pixels of each image by a factor drawn from 1 +- this.
        contrast: Augmentation: scale each image around its mean by a factor drawn from 1 +- this.
        random_erasing: Augmentation: probability of filling one rectangle of an image with random pixels.
        photographed: Augmentation: share of the images that look as if cut out of a photograph (see files/grounds.py).
        num_workers: Worker processes. 0 is fastest here: fetching a batch takes microseconds.
        dataset_on_device: Keep all images on the device (47 MB); None does so on CUDA, if there are no workers.

    Raises:
        ValueError: If a number is out of its range.
        DatasetError: From `prepare_data` and `setup`, if files can't be had or `val_size` leaves no training image.
    """

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 128,
        image_size: int = 28,
        val_size: int = 5000,
        split_seed: int = 0,
        eval_batch_size: int | None = None,
        channels: int = 1,
        mean: float = 0.0,
        std: float = 1.0,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        brightness: float = 0.0,
        contrast: float = 0.0,
        random_erasing: float = 0.0,
        photographed: float = 0.0,
        num_workers: int = 0,
        dataset_on_device: bool | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.hparams.update(plain_settings(self.hparams))
        at_least = {"batch_size": 1, "eval_batch_size": 1, "image_size": 1, "val_size": 0, "crop_padding": 0}
        for name, least in (at_least | {"num_workers": 0}).items():
            if (value := self.hparams[name]) is not None and value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")
        if channels not in (1, 3):
            raise ValueError(f"data.channels={channels} must be 1 or 3")
        if not math.isfinite(mean):
            raise ValueError(f"data.mean={mean} must be a finite number")
        if not 0 < std < math.inf:
            raise ValueError(f"data.std={std} must be a positive number")
        for name in ("brightness", "contrast", "random_erasing", "photographed"):
            if not 0 <= self.hparams[name] <= 1:
                raise ValueError(f"data.{name}={self.hparams[name]} must lie between 0 and 1")
        if dataset_on_device and num_workers:
            raise ValueError("data.dataset_on_device needs data.num_workers=0: workers can't reach the device's memory")
        self.data_dir = Path(expanded(str(data_dir)))
        self._folder: Path | None = None  # where the verified files are
        self.batch_size, self.eval_batch_size = int(batch_size), int(eval_batch_size or batch_size)  # NumPy's, too
        self.image_size, self.num_workers, self._passes = image_size, num_workers, 0

    class_names: tuple[str, ...] = CLASS_NAMES
    find_data = staticmethod(whole_below)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image as the network sees it."""
        return self.hparams["channels"], self.image_size, self.image_size

    def prepare_data(self) -> None:
        """Find or download the files, on one process of each machine."""
        self._folder = prepare(self.data_dir)

    def setup(self, stage: str) -> None:
        """Load the images that the stage needs, once, and split the training images."""
        if hasattr(self, "train_set" if stage in ("fit", "validate") else "test_set"):
            return
        self._folder = folder = self._folder or prepare(self.data_dir)
        if stage in ("fit", "validate"):
            images, labels = load(folder, "train")
            if (val_size := self.hparams["val_size"]) >= len(images):
                raise DatasetError(
                    f"data.val_size={val_size} leaves none of the {len(images)} training images in {folder}; lower it"
                )
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.hparams["split_seed"]))
            parts = [part.sort().values for part in (order[val_size:], order[:val_size])]
            self.train_set, self.val_set = (ImageTensors(images[part], labels[part]) for part in parts)
        else:
            self.test_set = ImageTensors(*load(folder, "test"))

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches: each process takes every world_size-th image of a global batch."""
        batches = TrainBatches(len(self.train_set), self.batch_size, *self._process, self._position)
        return self._loader(self.train_set, batches)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Validation batches in order; no loader if nothing is held out."""
        return self._eval_loader(self.val_set) if len(self.val_set) else []

    def test_dataloader(self) -> DataLoader:
        """The test images in order."""
        return self._eval_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        """The test images in order; Lightning gives writers indices only from a `batch_sampler`."""
        return self._eval_loader(self.test_set, "batch_sampler")

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment (in training), scale, resize and normalise a whole batch on the device.

        From images (N, C, H, W) uint8 and labels (N,) to (N, channels, image_size, image_size) float32 and labels.
        """
        images, labels = batch
        if self.trainer is None or not self.trainer.training:
            return self.preprocess(images), labels
        settings = self.hparams
        images = shift_and_flip(images, settings["crop_padding"], settings["horizontal_flip"])
        images = photographed(images, labels, settings["photographed"])
        pixels = erase(images, settings["random_erasing"]).float().div_(255)
        return self.as_seen(jitter(pixels, settings["brightness"], settings["contrast"])), labels

    def preprocess(self, images: Tensor) -> Tensor:
        """Images as the network sees them outside training: scaled, resized and normalised.

        From (N, H, W) or (N, C, H, W) uint8, Fashion-MNIST's light on dark, to (N, channels, image_size, image_size)
        float32. Raises ValueError if they are not uint8.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"the images are {images.dtype}; torch.uint8, from 0 to 255, was expected")
        return self.as_seen((images if images.dim() == 4 else images.reshape(-1, 1, *images.shape[-2:])).float() / 255)

    def as_seen(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in 0..1, which may be overwritten: resized and normalised."""
        if (size := self.image_size) != pixels.shape[-1]:
            # Antialiasing, as PIL does when it shrinks an image; enlarging one needs none.
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=size < pixels.shape[-1])
        mean, std = self.hparams["mean"], self.hparams["std"]
        if mean != 0 or std != 1:
            pixels = pixels.sub_(mean).div_(std)
        return pixels.expand(-1, self.hparams["channels"], -1, -1)

    @property
    def _process(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _position(self) -> tuple[int, int]:
        """Epoch and batch at which training continues; not batch 0 if a checkpoint was saved within an epoch."""
        if (trainer := cast("Any", self.trainer)) is None or trainer.state.stopped:
            self._passes += 1  # each in an order of its own
            return self._passes, 0
        epoch, batch = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress.current
        order = epoch.processed * (not getattr(trainer, "overfit_batches", 0))  # whose images stay the same
        return order, batch.processed if epoch.ready > epoch.processed else 0

    def _eval_loader(self, images: ImageTensors, kind: str = "sampler") -> DataLoader:
        return self._loader(images, EvalBatches(len(images), self.eval_batch_size, *self._process), kind)

    def _loader(self, images: ImageTensors, batches: Sampler, kind: str = "sampler") -> DataLoader:
        on_device = self.hparams["dataset_on_device"]
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if on_device or (on_device is None and device.type == "cuda" and not self.num_workers):
            images = images.to(device)
        return DataLoader(
            images,
            batch_size=None if kind == "sampler" else 1,  # a sampler yields whole batches already
            **{kind: batches},  # type: ignore[arg-type]
            collate_fn=default_convert,  # nothing to collate: a batch was fetched as a whole
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_main,
            persistent_workers=self.num_workers > 0,
            pin_memory=device.type == "cuda" and not images.images.is_cuda,
        )
