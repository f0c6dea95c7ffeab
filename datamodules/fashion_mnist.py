"""Fashion-MNIST as a LightningDataModule; images stay 28x28 bytes until they are on the device."""

import os
import signal
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from checkpoints.reading import check_hyper_parameters
from datamodules.files.finding import DatasetError, load, prepare

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# The label that LitClassifier's metrics leave out (PyTorch's own default for ignored targets).
_IGNORED_LABEL = -100


class FashionMNISTDataModule(pl.LightningDataModule):
    """Train, validation and test batches of images (N, channels, image_size, image_size) and labels (N,).

    The validation images are drawn from the 60,000 training images; the 10,000 official test images are used only
    by `test` and `predict`. Source of the data: Xiao et al. 2017, arXiv:1708.07747.

    Args:
        data_dir: Folder of the four files, raw or .gz; where they are missing they are found or downloaded.
        batch_size: Training images a step on each device.
        image_size: Height and width of the images that the network sees, in pixels.
        val_size: Number of training images held out for validation; 0 trains on all.
        split_seed: Seed of the split into training and validation images.
        eval_batch_size: Images a step in validation, test and prediction; None takes `batch_size`.
        channels: 1, or 3 to repeat the grey channel for networks made for colour.
        mean: Subtracted from the pixels, which lie in 0..1 (0.2860 centres the training images).
        std: The pixels are divided by it afterwards (0.3530 scales the training images).
        crop_padding: Augmentation: shift each image by up to this many of its 28 pixels in both directions.
        horizontal_flip: Augmentation: mirror half of the images.
        brightness: Augmentation: multiply the pixels of each image by a factor drawn from 1 +- this.
        contrast: Augmentation: scale each image around its mean by a factor drawn from 1 +- this.
        random_erasing: Augmentation: probability of filling one rectangle of an image with random pixels, 2 to 33 % of
            its area and 0.3 to 3.3 times as high as wide (Zhong et al. 2017, arXiv:1708.04896).
        num_workers: Worker processes. 0 is fastest here: fetching a batch takes microseconds.
        dataset_on_device: Keep all images in the device's memory (47 MB), so that only their indices travel. None does
            so on CUDA, unless there are workers, which can't reach it.

    Raises:
        ValueError: If a number is out of its range.
        DatasetError: From `prepare_data` and `setup`, if the files can't be had or `val_size` leaves no training image.
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
        num_workers: int = 0,
        dataset_on_device: bool | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("image_size", image_size, 1),
            ("val_size", val_size, 0),
            ("crop_padding", crop_padding, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")
        if channels not in (1, 3):
            raise ValueError(f"data.channels={channels} must be 1 or 3")
        if not -float("inf") < mean < float("inf"):
            raise ValueError(f"data.mean={mean} must be a finite number")
        if not 0 < std < float("inf"):
            raise ValueError(f"data.std={std} must be a positive number")
        for name, share in (
            ("brightness", brightness),
            ("contrast", contrast),
            ("random_erasing", random_erasing),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"data.{name}={share} must lie between 0 and 1")
        if dataset_on_device and num_workers:
            raise ValueError("data.dataset_on_device needs data.num_workers=0: workers can't reach the device's memory")
        self.data_dir = Path(data_dir)
        self._folder: Path | None = None  # where the verified files lie
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.image_size = image_size
        self.num_workers = num_workers

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | PathLike[str], *args: Any, trust_checkpoint: bool = False, **kwargs: Any
    ) -> "FashionMNISTDataModule":
        """The data module of a checkpoint file, whose content is not trusted.

        Args and errors are those of `LitClassifier.load_from_checkpoint`.
        """
        path = check_hyper_parameters(checkpoint_path, trust_checkpoint)
        return super().load_from_checkpoint(path, *args, **kwargs | {"weights_only": True})

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
            val_size = self.hparams["val_size"]
            if val_size >= len(images):
                raise DatasetError(
                    f"data.val_size={val_size} leaves none of the {len(images)} training images in {folder}; lower it"
                )
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.hparams["split_seed"]))
            train, val = order[val_size:].sort().values, order[:val_size].sort().values
            self.train_set = ImageTensors(images[train], labels[train])
            self.val_set = ImageTensors(images[val], labels[val])
        else:
            self.test_set = ImageTensors(*load(folder, "test"))

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches: each process takes every world_size-th image of a global batch."""
        trainer = self.trainer
        assert trainer is not None
        sampler = TrainBatches(
            len(self.train_set), self.batch_size, trainer.global_rank, trainer.world_size, self._position
        )
        return self._loader(self.train_set, sampler)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Validation batches in order; no loader where nothing is held out."""
        return self._eval_loader(self.val_set) if len(self.val_set) else []

    def test_dataloader(self) -> DataLoader:
        """The official test images in order."""
        return self._eval_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        """The official test images in order."""
        return self._eval_loader(self.test_set)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment (in training), scale, resize and normalise a whole batch on the device.

        Args:
            batch: Images (N, 1, 28, 28) uint8 and labels (N,).
            dataloader_idx: Not used.

        Returns:
            Images (N, channels, image_size, image_size) float32 and the labels.
        """
        images, labels = batch
        if self.trainer is None or not self.trainer.training:
            return self.preprocess(images), labels
        pixels = self._erase(self._shift_and_flip(images)).float().div_(255)
        return self._as_seen(self._jitter(pixels)), labels

    def preprocess(self, images: Tensor) -> Tensor:
        """Images as the network sees them outside training: scaled, resized and normalised.

        Args:
            images: Grey, light on dark, (N, 28, 28) or (N, 1, 28, 28) uint8.

        Returns:
            Images (N, channels, image_size, image_size) float32.

        Raises:
            ValueError: If the images are not uint8.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"the images are {images.dtype}; torch.uint8, from 0 to 255, was expected")
        return self._as_seen(images.reshape(-1, 1, *images.shape[-2:]).float().div_(255))

    def _as_seen(self, pixels: Tensor) -> Tensor:
        if self.image_size != pixels.shape[-1]:
            size = (self.image_size, self.image_size)
            # Antialiasing is what PIL does when it shrinks an image; when it enlarges one there is nothing to do.
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=self.image_size < pixels.shape[-1])
        mean, std = self.hparams["mean"], self.hparams["std"]
        if mean != 0 or std != 1:
            pixels = pixels.sub_(mean).div_(std)
        channels = self.hparams["channels"]
        return pixels.expand(-1, channels, -1, -1) if channels > 1 else pixels

    def _position(self) -> tuple[int, int]:
        """Epoch and batch at which training goes on; not batch 0 where a checkpoint was saved within an epoch."""
        assert self.trainer is not None
        fit_loop = self.trainer.fit_loop
        epoch: Any = fit_loop.epoch_progress.current
        batch: Any = fit_loop.epoch_loop.batch_progress.current
        return epoch.processed, batch.processed if epoch.ready > epoch.processed else 0

    def _shift_and_flip(self, images: Tensor) -> Tensor:
        """Move and mirror the whole uint8 batch, each image by its own draw."""
        padding, flip = self.hparams["crop_padding"], self.hparams["horizontal_flip"]
        if not padding and not flip:
            return images
        count, _, height, width = images.shape
        device = images.device
        shifts = torch.randint(0, 2 * padding + 1, (2, count, 1), device=device)
        padded = F.pad(images[:, 0], (padding,) * 4)
        # A view of every place where an image's window may lie; one gather picks each image's own.
        windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # (N, rows, columns, H, W)
        moved = windows[torch.arange(count, device=device), shifts[0, :, 0], shifts[1, :, 0]]
        if flip:
            keep = torch.rand(count, 1, 1, device=device) < 0.5
            moved = torch.where(keep, moved, moved.flip(-1))
        return moved[:, None]

    def _erase(self, images: Tensor) -> Tensor:
        """Fill a rectangle of some of the uint8 images, each of its own size and place, with random pixels."""
        probability = self.hparams["random_erasing"]
        if not probability:
            return images
        count, _, height, width = images.shape
        device = images.device
        chosen, area, aspect, y, x = torch.rand(5, count, 1, 1, device=device)
        area = (0.02 + 0.31 * area) * height * width
        aspect = 0.3 * 11**aspect  # 0.3 to 3.3; drawn evenly in its logarithm: as often high as wide
        # The largest and longest rectangles would be 4 % longer than the image.
        rows = (area * aspect).sqrt().round().clamp(max=height)
        columns = (area / aspect).sqrt().round().clamp(max=width)
        row = torch.arange(height, device=device)[:, None] - (y * (height - rows + 1)).floor()  # counted from the top
        column = torch.arange(width, device=device) - (x * (width - columns + 1)).floor()
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns) & (chosen < probability)
        return torch.where(inside[:, None], torch.empty_like(images).random_(), images)

    def _jitter(self, pixels: Tensor) -> Tensor:
        brightness, contrast = self.hparams["brightness"], self.hparams["contrast"]
        if not brightness and not contrast:
            return pixels
        draws = 2 * torch.rand(2, len(pixels), 1, 1, 1, device=pixels.device) - 1
        pixels = pixels * (1 + brightness * draws[0])
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
        return (mean + (pixels - mean) * (1 + contrast * draws[1])).clamp_(0, 1)

    def _eval_loader(self, images: "ImageTensors") -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        sampler = EvalBatches(len(images), self.eval_batch_size, trainer.global_rank, trainer.world_size)
        return self._loader(images, sampler)

    def _loader(self, images: "ImageTensors", batches: Sampler) -> DataLoader:
        on_device = self.hparams["dataset_on_device"]
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        if on_device or (on_device is None and device.type == "cuda" and not self.num_workers):
            images = images.to(device)
        return DataLoader(
            images,
            batch_sampler=batches,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            worker_init_fn=_leave_signals_to_main,
            persistent_workers=self.num_workers > 0,
            pin_memory=device.type == "cuda" and not images.images.is_cuda,
        )


class ImageTensors(Dataset):
    """Images (N, 28, 28) uint8 and labels (N,) int64 in memory; a batch is one indexing operation."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images[:, None]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of images (N, 1, 28, 28) and labels; an empty batch becomes one blank image that is not counted."""
        if len(indices) == 0:
            return torch.zeros_like(self.images[:1]), torch.full_like(self.labels[:1], _IGNORED_LABEL)
        indices = indices.to(self.labels.device, non_blocking=True)
        # Several times as fast as images[indices] on the CPU.
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)

    def to(self, device: torch.device) -> "ImageTensors":
        """The same images and labels in the device's memory."""
        return ImageTensors(self.images[:, 0].to(device), self.labels.to(device))


class TrainBatches(Sampler[Tensor]):
    """Indices of one process's training batches, in an order that depends on seed and epoch alone.

    Each pass begins where `position` says that training stands (epoch, batch), so that a continued run sees the rest of
    its epoch and no image twice. (Lightning's `set_epoch` comes too late for workers, which fetch ahead.)

    A global batch is `batch_size * world_size` images long; process r takes every world_size-th of them from r on, so
    all processes make the same number of steps and each image is seen once an epoch. (Only where the last global
    batch has fewer images than there are processes does one image stand in for the missing ones.)
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self.count = count
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.position = position

    def __len__(self) -> int:
        return -(-self.count // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Tensor]:
        run_seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))  # where seed_everything leaves it
        epoch, done = self.position()
        generator = torch.Generator().manual_seed(run_seed * 1_000_003 + epoch)
        order = torch.randperm(self.count, generator=generator)
        for batch in order.split(self.batch_size * self.world_size)[done:]:
            yield batch[self.rank :: self.world_size] if len(batch) > self.rank else batch[:1]


class EvalBatches(Sampler[Tensor]):
    """Indices of one process's evaluation batches: the batches of a single process, dealt out in turn.

    Nothing is padded with duplicates, which would count twice. All processes make the same number of steps, so a
    process that would have none left gets an empty batch.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.batches = torch.arange(count).split(batch_size)
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-len(self.batches) // self.world_size)

    def __iter__(self) -> Iterator[Tensor]:
        for turn in range(0, len(self.batches), self.world_size):
            mine = turn + self.rank
            yield self.batches[mine] if mine < len(self.batches) else torch.empty(0, dtype=torch.long)


def _leave_signals_to_main(worker: int) -> None:
    """Signals go to the whole process group; the main process ends the workers when it has saved a checkpoint."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch
