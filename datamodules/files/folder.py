"""A folder of one's own pictures as a LightningDataModule; its batches are made as Fashion-MNIST's are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batches import ImageTensors
from datamodules.fashion_mnist import FashionMNISTDataModule
from datamodules.files.decoding import Cache, fit_square, printable, read_folder
from datamodules.files.finding import DatasetError
from datamodules.files.photographs import saturate, warp

ON_DEVICE = 4_000_000_000  # bytes of a set that is kept in a GPU's memory unasked
LUMA = (0.299, 0.587, 0.114)  # as Pillow turns colours into greys


class FolderDataModule(FashionMNISTDataModule):
    """Pictures of any kind and size, one sub-folder a class, with train, val and test folders above them or without.

    They are decoded once, to squares of `stored_size` pixels that lie as bytes in `data_dir`/cache and are mapped into
    memory: a set may be larger than that. Without a test folder the test is on the validation folder; without either a
    part of each class is held out.

    Args:
        folder: The folder; nothing in it is changed. Without one, pictures can be looked at, but not trained on.
        class_names: Names of the classes, in the order of the network's outputs; None takes the sub-folders'.
        data_dir: Folder for the cache.
        val_size: Pictures held out for validation where there is no such folder: None takes a tenth. 0 trains on all,
            and does not look at a validation folder.
        test_size: Pictures held out for the test where there is neither such a folder nor one for validation.
        channels: 1 for grey, 3 for colour; None takes the pictures'.
        mean: Subtracted from the pixels, which lie in 0..1; None takes the training pictures'.
        std: The pixels are divided by it afterwards; None takes the training pictures'.
        stored_size: Pixels of a stored picture's edge; None takes `image_size`.
        bad_files: Whether files that can't be read are left out or refused.
        rotation: Augmentation: turn each image by up to this many degrees.
        zoom: Augmentation: scale each image by a factor drawn from 1 +- this.
        shift: Augmentation: move each image by up to this share of its size in both directions.
        saturation: Augmentation: scale the colours of each image around its greys by a factor drawn from 1 +- this.
        balanced: Draw an epoch's images, some several times and others not at all, so that all classes are as likely.
        kwargs: As for `FashionMNISTDataModule`; `dataset_on_device=None` keeps sets of up to 4 GB on CUDA.

    Raises:
        ValueError: If a number is out of its range.
        DatasetError: From `prepare_data` and `setup`, if the folder can't be used.
    """

    def __init__(
        self,
        folder: str = "",
        class_names: list[str] | None = None,
        data_dir: str = "data",
        val_size: int | None = None,
        test_size: int | None = None,
        channels: int | None = None,
        mean: float | None = None,
        std: float | None = None,
        stored_size: int | None = None,
        bad_files: Literal["skip", "refuse"] = "skip",
        rotation: float = 0.0,
        zoom: float = 0.0,
        shift: float = 0.0,
        saturation: float = 0.0,
        balanced: bool = False,
        **kwargs: Any,
    ) -> None:
        # What is left open is checked as if it were these; the settings themselves stay None until it is known.
        known = {"val_size": val_size, "channels": channels, "mean": mean, "std": std}
        filled: dict[str, Any] = {"val_size": 0, "channels": 1, "mean": 0.0, "std": 1.0}
        filled |= {name: value for name, value in known.items() if value is not None}
        super().__init__(data_dir=data_dir, **filled, **kwargs)
        for name, value, least in (("stored_size", stored_size, 1), ("test_size", test_size, 0)):
            if value is not None and value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")
        for name, most in {"rotation": 180, "zoom": 1, "shift": 1, "saturation": 1}.items():
            if not 0 <= self.hparams[name] <= most:
                raise ValueError(f"data.{name}={self.hparams[name]} must lie between 0 and {most}")
        # Out of a checkpoint they may be any text.
        self.class_names = tuple(printable(name) for name in class_names or ())
        self._cache: Cache | None = None

    @property
    def stored_size(self) -> int:
        """Pixels of a stored picture's edge."""
        return self.hparams["stored_size"] or self.image_size

    def prepare_data(self) -> None:
        """List and decode the pictures; what the settings leave open is taken from them."""
        if self._cache is not None:
            return
        settings = self.hparams
        if not settings["folder"]:
            raise DatasetError("the network was trained on pictures of a folder; say where they lie: --data FOLDER")
        folder = Path(settings["folder"]).expanduser()
        split = (settings[name] for name in ("val_size", "test_size", "split_seed"))
        found = read_folder(folder, self.stored_size, self.data_dir / "cache", settings["bad_files"], *split)
        if self.class_names and found.classes != self.class_names:
            raise DatasetError(
                f"{folder} has the classes {_listed(found.classes)}; the network knows {_listed(self.class_names)}"
            )
        self._cache = found
        self.class_names = found.classes
        mine = {"channels": found.parts["train"][0].shape[1], "mean": found.mean, "std": found.std}
        settings.update({name: value for name, value in mine.items() if settings[name] is None})
        settings["class_names"] = list(found.classes)

    def setup(self, stage: str) -> None:
        """Map the pictures, once."""
        self.prepare_data()
        assert self._cache is not None
        self.train_set, self.val_set, self.test_set = (
            ImageTensors(*self._cache.parts[part]) for part in ("train", "val", "test")
        )
        if self.hparams["dataset_on_device"] is None and self.train_set.images.nbytes > ON_DEVICE:
            self.hparams["dataset_on_device"] = False
        if stage in ("test", "predict") and not len(self.test_set):
            raise DatasetError(f"{self.hparams['folder']}: no pictures are left to test on; set data.test_size")

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches; with `balanced` an epoch's images are drawn so that all classes are as likely."""
        loader = super().train_dataloader()
        if self.hparams["balanced"]:
            labels = self.train_set.labels
            loader.sampler.weights = 1 / labels.bincount()[labels].double()  # type: ignore[attr-defined]
        return loader

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """In training what photographs need is done first, to the bytes as they are stored."""
        images, labels = batch
        if self.trainer is not None and self.trainer.training:
            images = warp(images, *(self.hparams[name] for name in ("rotation", "zoom", "shift")))
            images = saturate(images, self.hparams["saturation"])
        return super().on_after_batch_transfer((images, labels), dataloader_idx)

    def _as_seen(self, pixels: Tensor) -> Tensor:
        if self.hparams["channels"] == 1 and pixels.shape[1] == 3:
            pixels = torch.einsum("nchw,c->nhw", pixels, pixels.new_tensor(LUMA))[:, None]
        return super()._as_seen(pixels)

    def fit_picture(self, picture: Image.Image) -> np.ndarray:
        """A picture of mode RGB or RGBA as those of the folder are stored: (S, S) or (S, S, 3) uint8."""
        pixels = fit_square(picture, self.stored_size)
        return pixels if self.hparams["channels"] == 3 else np.array(Image.fromarray(pixels).convert("L"))


def class_of(settings: Mapping[str, Any]) -> type[FashionMNISTDataModule]:
    """The class to which the settings of a data set belong."""
    return FolderDataModule if "folder" in settings else FashionMNISTDataModule


def _listed(names: Any) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
