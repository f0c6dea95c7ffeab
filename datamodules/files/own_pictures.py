"""Other pictures than Fashion-MNIST's as a LightningDataModule: a folder of one's own, or a set of torchvision's."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batches import ImageTensors
from datamodules.fashion_mnist import FashionMNISTDataModule
from datamodules.files.decoding import Cache, Fit, fit_square, on_ground, read_folder
from datamodules.files.finding import DatasetError
from datamodules.files.listing import listed, printable, warn_once
from datamodules.files.photographs import saturate, warp
from datamodules.files.torchvision_sets import read_data_set
from errors import expanded

ON_DEVICE = 0.25  # of a GPU's free memory, at most, that a set takes unasked
DARK = 0.3  # mean of pictures that are light on a dark ground
LUMA = (0.299, 0.587, 0.114)  # as Pillow turns colours into greys


class PicturesDataModule(FashionMNISTDataModule):
    """Pictures of any kind and size: of a folder with a sub-folder for each class, or of a data set of torchvision's.

    They are decoded once, to squares of `stored_size` pixels that lie as bytes in `data_dir`/cache and are mapped into
    memory: a set may be larger than that. Train, val and test folders above the classes are recognised. Without a test
    part the test is on the validation part; without either a part of each class is held out. A val or a test folder
    alone is measured on whole.

    Args:
        folder: The folder; nothing in it is changed. With neither folder nor data set, pictures can be looked at, but
            not trained on.
        dataset: A data set of torchvision's, like "cifar10", or the dotted path of a class like them.
        class_names: Names of the classes, in the order of the network's outputs; None takes the pictures'.
        data_dir: Folder for the cache, and for the files of a data set.
        val_size: Pictures held out for validation where there is no such part: None takes a tenth. 0 trains on all,
            and does not look at a validation part.
        test_size: Pictures held out for the test where there is neither such a part nor one for validation.
        channels: 1 for grey, 3 for colour; None takes the pictures'.
        mean: Subtracted from the pixels, which lie in 0..1; None takes the training pictures'.
        std: The pixels are divided by it afterwards; None takes the training pictures'.
        stored_size: Pixels of a stored picture's edge; None takes `image_size`, or a data set's own if that is small.
        fit: How pictures become squares: "crop" scales the shorter edge and cuts the longer one, evenly on both sides;
            "pad" scales the longer one and fills up with black; "stretch" does not keep the proportions.
        bad_files: Whether files that can't be read are left out or refused.
        rotation: Augmentation: turn each image by up to this many degrees.
        zoom: Augmentation: scale each image by a factor drawn from 1 +- this.
        shift: Augmentation: move each image by up to this share of its size in both directions.
        saturation: Augmentation: scale the colours of each image around its greys by a factor drawn from 1 +- this.
        balanced: Draw an epoch's images, some several times and others not at all, so that all classes are as likely.
        kwargs: As for `FashionMNISTDataModule`, but for `photographed`; `dataset_on_device=None` keeps sets on CUDA
            that take up to a quarter of the memory free there.

    Raises:
        ValueError: If a number is out of its range.
        DatasetError: From `prepare_data` and `setup`, if folder or data set can't be used.
    """

    def __init__(
        self,
        folder: str = "",
        dataset: str = "",
        class_names: list[str] | None = None,
        data_dir: str = "data",
        val_size: int | None = None,
        test_size: int | None = None,
        channels: int | None = None,
        mean: float | None = None,
        std: float | None = None,
        stored_size: int | None = None,
        fit: Fit = "crop",
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
        if self.hparams["photographed"]:
            raise ValueError("data.photographed is for Fashion-MNIST's images, whose background is 0")
        for name, most in {"rotation": 180, "zoom": 1, "shift": 1, "saturation": 1}.items():
            if not 0 <= self.hparams[name] <= most:
                raise ValueError(f"data.{name}={self.hparams[name]} must lie between 0 and {most}")
        if folder and dataset:
            raise ValueError(f"data.folder={folder} and data.dataset={dataset} can't go together; give one of them")
        # Out of a checkpoint they may be any text.
        self.class_names = tuple(printable(name) for name in class_names or ())
        self._cache: Cache | None = None

    @property
    def stored_size(self) -> int:
        """Pixels of a stored picture's edge."""
        return self.hparams["stored_size"] or self.image_size

    @property
    def source(self) -> str:
        """The folder, or the data set's name; "" with neither."""
        return self.hparams["folder"] or self.hparams["dataset"]

    def prepare_data(self) -> None:
        """List and decode the pictures; what the settings leave open is taken from them."""
        if self._cache is not None:
            return
        settings, source = self.hparams, self.source
        if not source:
            raise DatasetError("the network is for other pictures than Fashion-MNIST's; say which: --data FOLDER")
        how = {name: settings[name] for name in ("fit", "bad_files", "val_size", "test_size")}
        how["seed"] = settings["split_seed"]
        if settings["folder"]:
            known, cached = self.class_names or None, self.data_dir / "cache"
            found = read_folder(Path(expanded(str(source))), self.stored_size, cached=cached, known=known, **how)
        else:
            sizes = self.image_size, settings["stored_size"]
            found = read_data_set(source, *sizes, data_dir=self.data_dir, **how)
        if self.class_names and found.classes != self.class_names:
            raise DatasetError(
                f"{source} has the classes {listed(found.classes)}; the network knows {listed(self.class_names)}"
            )
        self._cache = found
        self.class_names = found.classes
        images = found.parts["train"][0]
        mine = {"channels": images.shape[1], "mean": found.mean, "std": found.std, "stored_size": images.shape[-1]}
        settings.update({name: value for name, value in mine.items() if settings[name] is None})
        settings["class_names"] = list(found.classes)

    def setup(self, stage: str) -> None:
        """Map the pictures, once."""
        self.prepare_data()
        assert self._cache is not None
        self.train_set, self.val_set, self.test_set = (
            ImageTensors(*self._cache.parts[part]) for part in ("train", "val", "test")
        )
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if self.hparams["dataset_on_device"] is None and device.type == "cuda":
            parts = [part.images for part in (self.train_set, self.val_set, self.test_set)]
            size = sum({images.data_ptr(): images.nbytes for images in parts}.values())
            fits = size <= ON_DEVICE * torch.cuda.mem_get_info(device)[0]
            self.hparams["dataset_on_device"] = fits and not self.num_workers  # once: the run takes memory too
        if stage == "fit" and not len(self.train_set):
            hint = "add a train folder beside it, or give --data that part itself"
            raise DatasetError(f"{self.source} holds one part alone, to measure a network on; {hint}")
        if stage in ("test", "predict") and not len(self.test_set):
            raise DatasetError(f"{self.source}: no pictures are left to test on; set data.test_size")

    def state_dict(self) -> dict[str, Any]:
        """What the training pictures are known by; saved in checkpoints."""
        return {"training_pictures": self._fingerprint} if self._cache else {}

    def held_out(self, part: Literal["val", "test"]) -> bool:
        """Whether a part was drawn from the training pictures, and does not come from a place of its own."""
        assert self._cache is not None
        of_part, of_training = ({name.partition("/")[0] for name in self._cache.names[one]} for one in (part, "train"))
        return bool(of_part & of_training)

    @cached_property
    def _fingerprint(self) -> str:
        assert self._cache is not None
        # Rounded, as versions of Pillow decode the same file a little differently.
        known = self._cache.names["train"], round(self._cache.mean, 6), round(self._cache.std, 6)
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to continue a training on other pictures."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING and state_dict != self.state_dict():
            raise DatasetError(
                f"{self.source}: the training pictures are not those that the checkpoint was trained on; put them "
                "back, or start again without --ckpt_path"
            )

    @property
    def test_names(self) -> list[str]:
        """Of each test picture its path within the folder, or its place in the data set."""
        self.prepare_data()
        assert self._cache is not None
        return self._cache.names["test"]

    def _eval_loader(self, images: ImageTensors, kind: str = "sampler") -> DataLoader:
        """The pictures in their order: a folder's come class by class, so that a limit leaves out whole classes."""
        loader = super()._eval_loader(images, kind)
        name = "limit_val_batches" if images is self.val_set else "limit_test_batches"
        trainer: Any = self.trainer
        limit = getattr(trainer, name, 1.0)
        spares = kind == "sampler" and 0 < limit < (len(loader) if isinstance(limit, int) else 1)
        by_class = len(images.labels.unique_consecutive()) == len(images.labels.unique())
        if spares and by_class and not trainer.fast_dev_run:
            hint = "set it to 1.0, or hold out fewer pictures"
            warn_once(f"trainer.{name}={limit} leaves out the last classes of {self.source}; {hint}")
        return loader

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

    def as_seen(self, pixels: Tensor) -> Tensor:
        """Also made grey, where the network sees one channel."""
        if self.hparams["channels"] == 1 and pixels.shape[1] == 3:
            luma = torch.tensor(LUMA, dtype=pixels.dtype).to(pixels.device, non_blocking=pixels.is_cuda)
            pixels = torch.einsum("nchw,c->nhw", pixels, luma)[:, None]
        return super().as_seen(pixels)

    def fit_picture(self, picture: Image.Image, invert: Literal["auto", "always", "never"] = "auto") -> np.ndarray:
        """A picture of mode RGB or RGBA as those trained on are stored: (S, S) or (S, S, 3) uint8.

        It is negated with `invert` "always", or if they are light on dark, as MNIST's, and its edges are light.
        """
        negated = invert == "always" or (invert == "auto" and self.negates(picture))
        pixels = fit_square(picture, self.stored_size, self.hparams["fit"], bars="white" if negated else "black")
        if self.hparams["channels"] == 1:
            pixels = np.array(Image.fromarray(pixels).convert("L"))
        return 255 - pixels if negated else pixels

    def negates(self, picture: Image.Image) -> bool:
        """Whether a picture is negated unasked: its edges are light, those trained on dark, and it has no colours."""
        dark, grey, fit = 0 < self.hparams["mean"] < DARK, self.hparams["channels"] == 1, self.hparams["fit"]
        return dark and _is_on_light(on_ground(picture).convert("L") if grey else picture, self.stored_size, fit)


def _is_on_light(picture: Image.Image, size: int, fit: Fit) -> bool:
    """Whether a picture without colours has light edges."""
    pixels = fit_square(picture, size, "stretch" if fit == "pad" else fit)  # bars are no edges
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return bool((pixels == pixels[..., :1]).all() and np.median(edges) > 127)


def class_of(settings: Mapping[str, Any]) -> type[FashionMNISTDataModule]:
    """The class to which the settings of a data set belong."""
    return PicturesDataModule if {"folder", "dataset"} & settings.keys() else FashionMNISTDataModule
