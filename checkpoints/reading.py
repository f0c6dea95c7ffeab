"""Reading checkpoints without trusting them."""

import codecs
import hashlib
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from os import PathLike
from pathlib import Path
from typing import Any

import lightning
import torch

from checkpoints.plain import check_plain
from errors import UserError

# The type of each part of a checkpoint, if present.
PLACES = {"epoch": int, "global_step": int, "hyper_parameters": dict, "datamodule_hyper_parameters": dict}
# Beside checkpoints that are distributed: each one's SHA-256. `python -m weights.pack` writes it.
LISTING = "weights.json"


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint file, tensors memory-mapped; nothing in it is executed.

    Raises:
        UserError: If the file is missing, is not a complete Lightning checkpoint, or is not the one that a
            `weights.json` beside it lists; the message says which.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:[/\\]", str(path), re.IGNORECASE):  # C:/ is a drive
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
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError  # torch never compresses; a few bytes could become any number
            damaged = archive.testzip()  # torch does not check the content against its checksums
            if damaged:
                raise UserError(f"{path} is damaged: {damaged} in it does not match its checksum")
            _check_calls(archive)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Validating sparse tensor")  # which is then refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds objects that a checkpoint of this project never holds; not loaded") from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    except Exception:  # whatever PyTorch's reader meets in such bytes
        raise UserError(f"{path} is damaged or is not a checkpoint") from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} is not a checkpoint of a training run: it holds no state_dict")
    weights = content["state_dict"]
    if not weights or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise UserError(f"{path} is damaged: its state_dict must hold the weights, and nothing else")
    # States of callbacks may hold whatever can be read; checkpoints/state.py looks at those that are restored.
    check_plain({key: value for key, value in content.items() if key != "callbacks"}, str(path), path.stat().st_size)
    version = content.get("pytorch-lightning_version", lightning.__version__)
    if not isinstance(version, str) or not re.fullmatch(r"[2-9]\.\d{1,4}(\.\w{1,20})*(\+\w{1,20})?", version, re.ASCII):
        raise UserError(f"{path} was not written by Lightning 2 or later; not loaded")
    for name, kind in PLACES.items():
        if not isinstance(content.get(name, kind()), kind):
            raise UserError(f"{path} is damaged: its {name} is no {kind.__name__}")
    return content


def listed(path: Path) -> dict[str, Any]:
    """What the `weights.json` beside a checkpoint says about it; empty if it is not listed, or there is no such file.

    Raises:
        UserError: If the `weights.json` is damaged.
    """
    listing = path.with_name(LISTING)
    try:
        entry = json.loads(listing.read_text(encoding="utf-8")).get(path.name, {})
        if not isinstance(entry.get("sha256", ""), str) or not 0 <= (entry.get("test_accuracy") or 0) <= 1:
            raise ValueError
        return entry
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{listing} is damaged; restore it, for instance with git checkout") from None


def _check_calls(archive: zipfile.ZipFile) -> None:
    """Refuse what would make of few bytes as many as fill the memory, while PyTorch reads them: a bytearray of a given
    length, a tensor or a storage of a given size without data, and bytes that are encoded again and again.

    Raises:
        UnpicklingError: If the archive holds one of them.
    """
    for entry in archive.infolist():
        if entry.filename.rpartition("/")[2] != "data.pkl":
            continue
        texts = {text for _, text, _ in pickletools.genops(archive.read(entry)) if isinstance(text, str)}
        if texts & {"builtins bytearray", "__builtin__ bytearray"}:
            raise pickle.UnpicklingError
        # Checkpoints name functions that rebuild tensors, and classes of storages that can't be called.
        if any(re.fullmatch(r"torch(\.\w+)* (\w*Tensor|TypedStorage)", text) for text in texts):
            raise pickle.UnpicklingError
        # Of which only tensors of rare types are rebuilt; how much they hold in all is checked later.
        if "torch.storage UntypedStorage" in texts and "torch._utils _rebuild_tensor_v3" not in texts:
            raise pickle.UnpicklingError
        if "_codecs encode" in texts and any(map(_takes_bytes, texts)):
            raise pickle.UnpicklingError


def _takes_bytes(text: str) -> bool:
    """Whether a text names an encoding of bytes, not of text: hex, say."""
    try:
        return len(text) < 40 and not codecs.lookup(text)._is_text_encoding
    except (LookupError, ValueError):
        return False


def _check_listed(path: Path) -> None:
    expected = listed(path).get("sha256")
    if expected is not None and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise UserError(
            f"{path} is damaged or was changed: its SHA-256 is not the one in {path.with_name(LISTING)}; "
            "restore it, for instance with git checkout"
        )
