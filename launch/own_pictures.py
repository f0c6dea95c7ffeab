"""A run on a folder of pictures: what of its settings the pictures decide."""

from typing import Any

from jsonargparse import Namespace

from cli.command import Command
from datamodules import FolderDataModule
from errors import UserError, one_line

DECIDED = ("class_names", "channels", "mean", "std")


def follow_pictures(config: Namespace, command: Command) -> dict[str, Any]:
    """Fill in what the pictures decide; a run that goes on from a checkpoint alone keeps the checkpoint's.

    Args:
        config: The parsed configuration, of which `data` and the number of classes are filled in.
        command: The command line that it was made from.

    Returns:
        Settings that a network follows, if it has them.

    Raises:
        UserError: If a number is out of its range.
        DatasetError: If the folder can't be used.
    """
    if command.configs:  # a recipe's own values are Fashion-MNIST's
        given = command.given()
        for name in DECIDED:
            if given.get(f"data.{name}") != "":
                config.data[name] = None
    if any(config.data[name] is None for name in DECIDED):
        try:
            data = FolderDataModule(**config.data)
        except ValueError as error:
            raise UserError(one_line(str(error))) from None
        data.prepare_data()
        for name in DECIDED:
            config.data[name] = data.hparams[name]
    config.model.num_classes = len(config.data.class_names)
    return {"num_classes": len(config.data.class_names), "in_channels": config.data.channels}
