"""Reading checkpoints without trusting them."""

import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from errors import UserError

# A checkpoint may name classes of these packages only: a file from elsewhere must not choose what is imported here.
TRUSTED_PACKAGES = ("models.", "lit_modules.", "torch.", "torchvision.")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file, tensors memory-mapped; nothing in it is executed.

    Raises:
        UserError: If the file is missing or is not a whole checkpoint of Lightning's; the message says which.
    """
    if re.match(r"[a-z0-9]+://", str(path), re.IGNORECASE) or ":/" in str(path)[:8]:
        raise UserError(f"{path} is an address; download the checkpoint first and give the file's path")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the path of a .ckpt file in it")
    if not path.exists():
        raise UserError(f"the checkpoint {path} does not exist")
    if path.stat().st_size == 0:
        raise UserError(f"the checkpoint {path} is empty")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not hold the content against its checksums
        if damaged:
            raise UserError(f"{path} is damaged: {damaged} in it does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds objects that a checkpoint of this project never holds; not loaded") from None
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError, OSError, NotImplementedError):
        raise UserError(f"{path} is damaged or is not a checkpoint") from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} is not a checkpoint of a training run: it holds no state_dict")
    return content


def stored_config(checkpoint: dict[str, Any], path: str, trust: bool) -> dict[str, Any]:
    """The configuration that a run left in its checkpoint.

    Args:
        checkpoint: What `read_checkpoint` returned.
        path: The file, for messages.
        trust: Allow any class path.

    Raises:
        UserError: If there is none, or it names a class outside the trusted packages.
    """
    try:
        config = yaml.safe_load(checkpoint["config"])
        if not isinstance(config["model"], dict) or not isinstance(config["data"], dict):
            raise TypeError
    except (KeyError, TypeError, AttributeError, yaml.YAMLError):
        raise UserError(f"{path} does not say how it was trained; add --model RECIPE") from None
    for class_path in _class_paths(config):
        if not trust and not str(class_path).startswith(TRUSTED_PACKAGES):
            raise UserError(
                f"{path} names the class {class_path}, outside this project, torch and torchvision; "
                "add --trust_checkpoint if you know where the file comes from"
            )
    return config


def _class_paths(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        if "class_path" in value:
            yield value["class_path"]
        for inner in value.values():
            yield from _class_paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _class_paths(inner)
