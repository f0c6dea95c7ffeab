"""A trained network and its preprocessing, as a checkpoint describes them."""

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import instantiate_module

from checkpoints.reading import read_checkpoint, stored_config
from datamodules import FashionMNISTDataModule
from errors import UserError
from lit_modules import LitClassifier


def load_trained(path: Path, trust: bool = False) -> tuple[LitClassifier, FashionMNISTDataModule, dict[str, Any]]:
    """Rebuild what a training run has saved.

    Args:
        path: A checkpoint.
        trust: Let it name any class.

    Returns:
        The classifier on the CPU, in evaluation mode; the data module, which knows how the network wants its images
        (the data set itself is not touched); the checkpoint's content.

    Raises:
        UserError: If the file can't be read, or does not fit the project's classes.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # where networks of the user's own lie
    checkpoint = read_checkpoint(path)
    config = stored_config(checkpoint, str(path), trust)
    plain = {"compile": False, "checkpoint_activations": False}  # these are for training
    try:
        classifier = instantiate_module(LitClassifier, config["model"] | plain)
        data = instantiate_module(FashionMNISTDataModule, config["data"])
        classifier.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # jsonargparse, networks and PyTorch raise various things
        raise UserError(f"{path} does not fit this version of the project: {' '.join(str(error).split())}") from None
    classifier.on_load_checkpoint(checkpoint)
    return classifier.eval(), data, checkpoint
