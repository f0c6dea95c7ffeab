"""A trained network and its preprocessing, as a checkpoint describes them."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import instantiate_module
from tqdm import tqdm

from checkpoints.plain import read_settings, recipe_name
from checkpoints.reading import listed, read_checkpoint
from checkpoints.trust import Trusted
from datamodules import FashionMNISTDataModule, PicturesDataModule, class_of
from datamodules.files.finding import whole_below
from errors import UserError, one_line
from lit_modules import LitClassifier

OWN_CLASS = "put the class into models/ and train again"  # where nothing can be trusted by a flag


def load_trained(
    path: Path, trust: bool = False, how: str = "add --trust_checkpoint"
) -> tuple[LitClassifier, FashionMNISTDataModule, dict[str, Any]]:
    """Rebuild what a training run saved.

    Args:
        path: A checkpoint.
        trust: Let it name any class.
        how: What to do about a class that is not trusted, for the message.

    Returns:
        The classifier on the CPU, in evaluation mode; the data module, which knows how the network wants its images
        (the data set itself is not touched); the checkpoint's content.

    Raises:
        UserError: If the file can't be read, or does not fit the project's classes.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # where the user's own networks are
    checkpoint = read_checkpoint(path)
    config = read_settings(checkpoint.get("config"), str(path), "take one that train.py wrote")
    rules = Trusted(str(path), trust, how, checkpoint["state_dict"], whole_below)
    used = rules.to_use(config)
    try:
        classifier = instantiate_module(LitClassifier, used["model"])
        data = instantiate_module(class_of(used["data"]), used["data"])
        classifier.load_state_dict(checkpoint["state_dict"])
        size = data.stored_size if isinstance(data, PicturesDataModule) else 28
        logits = classifier.eval()(data.preprocess(torch.zeros(1, size, size, dtype=torch.uint8)))
        if logits.shape != (1, len(data.class_names)):
            raise ValueError(f"the network gives outputs of shape {tuple(logits.shape)} for one image")
    except Exception as error:  # jsonargparse, networks and PyTorch raise various things
        raise UserError(f"{path} does not fit this version of the project: {one_line(str(error))}") from None
    classifier.on_load_checkpoint(checkpoint)
    if "recipe" in checkpoint:
        checkpoint["recipe"] = recipe_name(checkpoint | listed(path))  # which knows that a recipe was renamed
    return classifier, data, checkpoint


def may_know(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a network may know images that are held out for validation.

    Args:
        then: The data's settings when it was trained.
        now: Those that hold them out.
    """
    size, earlier = (math.inf if of["val_size"] is None else of["val_size"] for of in (now, then))
    return size > 0 and (size > earlier or now["split_seed"] != then["split_seed"])


@torch.no_grad()
def logits_of(
    classifier: LitClassifier,
    data: FashionMNISTDataModule,
    images: torch.Tensor,
    mirror: bool = False,
    bar: str | None = None,
) -> torch.Tensor:
    """Logits (N, classes) float32, on the CPU, of uint8 images (N, C, H, W), computed batch by batch.

    With `mirror` they are the mean of those of each image and of its mirror image. With `bar`, a progress bar of that
    name is shown if stderr is a terminal.
    """

    def logits(batch: torch.Tensor) -> torch.Tensor:
        return classifier(data.preprocess(batch.to(classifier.device))).float().cpu()

    batches = tqdm(images.split(data.eval_batch_size), bar, leave=False, disable=None if bar else True)
    return torch.cat([(logits(batch) + logits(batch.flip(-1))) / 2 if mirror else logits(batch) for batch in batches])
