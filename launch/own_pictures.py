"""A run on other pictures than Fashion-MNIST's: what of its settings the pictures decide."""

from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace

from cli.command import Command
from datamodules import PicturesDataModule
from errors import UserError, is_first_process, one_line, print_warning
from runs.settings import DECIDED

# Sets whose pictures are of another class, or of none, in the mirror: digits, letters, traffic signs.
ONE_WAY = (
    *("mnist", "kmnist", "qmnist", "usps", "semeion", "svhn", "gtsrb", "renderedsst2"),
    *("emnist", "emnist_letters", "emnist_digits", "emnist_byclass"),
)


def follow_pictures(config: Namespace, command: Command, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what the pictures decide and the user leaves open; without a recipe, the checkpoint's values stay.

    Args:
        config: The parsed configuration, of which `data` and the number of classes are filled in.
        command: The command line that it was made from.
        stored: The settings of the data in the checkpoint; empty without one.

    Returns:
        Settings that a network follows, if it has them.

    Raises:
        UserError: If a number is out of its range.
        DatasetError: If folder or data set can't be used.
    """
    if command.configs:
        given, decided, fixed = command.given(), command.decided(), []
        source = given.get("data.folder"), given.get("data.dataset")  # a file's path; "" is a flag
        for name in DECIDED:
            file = given.get(f"data.{name}")
            if file and f"data.{name}" not in decided:
                config.data[name] = None
            elif file and file not in source and name in ("channels", "mean", "std") and config.data[name] is not None:
                fixed.append(f"{name} {config.data[name]}")
        if fixed and is_first_process():
            print_warning(f"a file sets {', '.join(fixed)} of the images, which the pictures decide if it is left out")
    # A trained network expects its own, whatever the pictures are now.
    for name in ("mean", "std") if command.subcommand == "fit" else DECIDED:
        if config.data[name] is None:
            config.data[name] = stored.get(name)
    if any(config.data[name] is None for name in DECIDED):
        try:
            data = PicturesDataModule(**config.data)
        except (ValueError, RuntimeError) as error:
            raise UserError(one_line(str(error))) from None
        except TypeError as error:  # of what no parser has seen
            raise UserError(f"{command.ckpt_path} says of its images what can't be: {error}") from None
        data.prepare_data()
        for name in DECIDED:
            config.data[name] = data.hparams[name]
    begins = command.subcommand == "fit" and not command.ckpt_path and is_first_process()
    mirrored = config.data.horizontal_flip and not command.asked_for("data.horizontal_flip")
    if begins and config.data.dataset in ONE_WAY and mirrored:
        why = f"the recipe mirrors images, and {config.data.dataset}'s mean something else in the mirror, or nothing"
        print_warning(f"{why}: --data.horizontal_flip false")
    config.model.num_classes = len(config.data.class_names)
    return {"num_classes": len(config.data.class_names), "in_channels": config.data.channels}
