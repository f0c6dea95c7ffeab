"""Reading checkpoints without trusting them."""

import hashlib
import importlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import yaml

from errors import UserError

# A checkpoint may name classes of these packages only: a file from elsewhere must not choose what is imported here.
TRUSTED_PACKAGES = ("models.", "lit_modules.", "callbacks.ema.", "callbacks.fine_tuning.", "torch.", "torchvision.")
# What LightningCLI has load_from_checkpoint call.
_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
# Where Lightning keeps the arguments of a module and of a data module, the first two in files of its early versions.
_HYPER_PARAMETERS = ("hparams", "module_arguments", "hyper_parameters", "datamodule_hyper_parameters")
# Settings that are folders, and nothing else.
_FOLDERS = ("data_dir", "default_root_dir")
# Beside checkpoints that are handed out: each one's SHA-256. `python -m weights.pack` writes it.
LISTING = "weights.json"


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint file, tensors memory-mapped; nothing in it is executed.

    Raises:
        UserError: If the file is missing, is not a whole checkpoint of Lightning's, or is not the one that a
            `weights.json` beside it lists; the message says which.
    """
    if re.match(r"[a-z0-9]+://", str(path), re.IGNORECASE) or ":/" in str(path)[:8]:
        raise UserError(f"{path} is an address; download the checkpoint first and give the file's path")
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the path of a .ckpt file in it")
    if not path.exists():
        raise UserError(f"the checkpoint {path} does not exist")
    if path.stat().st_size == 0:
        raise UserError(f"the checkpoint {path} is empty")
    _check_listed(path)
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


def listed(path: Path) -> dict[str, Any]:
    """What the `weights.json` beside a checkpoint says of it; empty if it is not listed, or there is no such file.

    Raises:
        UserError: If the `weights.json` is damaged.
    """
    listing = path.with_name(LISTING)
    try:
        return json.loads(listing.read_text(encoding="utf-8")).get(path.name, {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{listing} is damaged; restore it, for instance with git checkout") from None


def _check_listed(path: Path) -> None:
    expected = listed(path).get("sha256")
    if expected is not None and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise UserError(
            f"{path} is damaged or was changed: its SHA-256 is not the one in {path.with_name(LISTING)}; "
            "restore it, for instance with git checkout"
        )


def stored_config(checkpoint: dict[str, Any], path: str, trust: bool) -> dict[str, Any]:
    """The configuration that a run left in its checkpoint.

    Args:
        checkpoint: What `read_checkpoint` returned.
        path: The file, for messages.
        trust: Allow any class.

    Raises:
        UserError: If there is none, or it names a class outside the trusted packages.
    """
    try:
        config = yaml.safe_load(checkpoint["config"])
        if not all(isinstance(config[section], dict) for section in ("model", "data")):
            raise TypeError
        if not isinstance(config.get("trainer") or {}, dict):
            raise TypeError
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, yaml.YAMLError):
        raise UserError(f"{path} does not say how it was trained; add --model RECIPE") from None
    for section in () if trust else ("model", "data", "trainer"):
        _check_names(config.get(section), path, "add --trust_checkpoint")
    return config


def check_hyper_parameters(path: Any, trust: bool) -> str:
    """Hold what Lightning's `load_from_checkpoint` would build to the trusted packages.

    Args:
        path: The checkpoint, a file of this machine.
        trust: Allow any class.

    Returns:
        The file's absolute path, which Lightning can't take for an address.

    Raises:
        UserError: If the file can't be used (see `read_checkpoint`), or names a class outside the trusted packages.
    """
    if not isinstance(path, str | PathLike):
        raise UserError(f"a checkpoint is loaded from a file; give its path, not {type(path).__name__}")
    checkpoint = read_checkpoint(path)
    for key in () if trust else _HYPER_PARAMETERS:
        _check_names(checkpoint.get(key), str(path), "pass trust_checkpoint=True")
    return str(Path(path).resolve())


def _check_names(settings: Any, path: str, how: str) -> None:
    try:
        foreign = next((name for key, name in _texts(settings) if not _is_harmless(key, name)), None)
    except RecursionError:
        raise UserError(f"{path} holds settings within themselves; not loaded") from None
    if foreign is not None:
        shown = re.sub(r"[^ -~]+", "?", str(foreign))[:80]
        raise UserError(
            f"{path} names the class {shown}, which this project, torch and torchvision do not have; "
            f"{how} if you know where the file comes from"
        )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every text in nested settings and everything given as a class, each with the name of its setting."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, str(name))
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str) or key == "class_path":
        yield key, value


def _is_harmless(key: str, text: Any) -> bool:
    """Whether no reading of a setting's text imports or opens what this project does not trust.

    The parser takes a text not only for itself: where a class is expected, for its name, for YAML that holds one, or
    for a file that does.
    """
    if key in _FOLDERS or (key == "_instantiator" and text == _INSTANTIATOR):
        return True
    if key != "class_path" and re.fullmatch(r"[\w:,+ -]*", text):
        return not Path(text).is_file()
    if not isinstance(text, str) or not text.startswith(TRUSTED_PACKAGES):
        return False
    # A trusted module also has what it imports from elsewhere: torch.hub.os.system.
    module, _, name = text.rpartition(".")
    try:
        home = getattr(importlib.import_module(module), name).__module__
    except (ImportError, AttributeError):
        return False
    return isinstance(home, str) and f"{home}.".startswith(TRUSTED_PACKAGES)
