"""A folder of pictures, one sub-folder a class: listed, split, and decoded once into memory-mapped bytes.

Nothing in it is written to. What is made of it lies in a cache folder, under a name that stands for its files' names,
sizes and times.
"""

import hashlib
import json
import logging
import os
import unicodedata
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from datamodules.files.finding import DatasetError
from datamodules.files.pictures import PictureError, is_picture_name, read_picture

# Usual names of the sub-folders that split a data set, lower case.
NAMES = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation", "dev"},
    "test": {"test", "testing"},
}
FEW = 5  # pictures of a class, with which little can be learned or measured
VERSION = 1  # of what a cache holds
log = logging.getLogger(__name__)


class File(NamedTuple):
    """One picture: its path within the folder, and its class."""

    path: str
    label: int


class Listing(NamedTuple):
    """The classes, in order, and the pictures of each part: train, val and test."""

    classes: tuple[str, ...]
    parts: dict[str, list[File]]


class Cache(NamedTuple):
    """The decoded pictures.

    Attributes:
        classes: Their names, in order.
        parts: Images (N, C, S, S) uint8, mapped from the file, and labels (N,) int64 of train, val and test.
        mean: Of the training pixels, which lie in 0..1.
        std: Of the training pixels.
    """

    classes: tuple[str, ...]
    parts: dict[str, tuple[Tensor, Tensor]]
    mean: float
    std: float


@cache
def read_folder(
    folder: Path,
    size: int,
    cached: Path,
    bad_files: Literal["skip", "refuse"],
    val_size: int | None,
    test_size: int | None,
    seed: int,
) -> Cache:
    """List and decode a folder, once in a process; see `list_folder` and `decode`."""
    return decode(folder, list_folder(folder, val_size, test_size, seed), size, cached, bad_files)


def list_folder(folder: Path, val_size: int | None, test_size: int | None, seed: int) -> Listing:
    """Find classes and pictures, and split them where the folder does not.

    Args:
        folder: Holds a sub-folder for each class, or train, val and test folders that do.
        val_size: Pictures held out for validation where there is no such folder; None takes a tenth, 0 none at all.
        test_size: The same for the test.
        seed: Of the split.

    Raises:
        DatasetError: If that is not what the folder holds.
    """
    inside = _sub_folders(folder)
    by_part = {part: next((path for path in inside if path.name.lower() in NAMES[part]), None) for part in NAMES}
    train = by_part["train"]
    if not (train and (by_part["val"] or by_part["test"] or len(inside) == 1) and _sub_folders(train)):
        classes, files = _classes(folder, folder, inside)
        parts: dict[str, list[File]] = {"train": files, "val": [], "test": []}
        by_part = {}
    else:
        if ignored := [path.name for path in inside if path not in by_part.values()]:
            log.warning("%s: %s beside train are not used", folder, ", ".join(map(printable, ignored)))
        classes, files = _classes(folder, train, _sub_folders(train))
        parts = {"train": files, "val": [], "test": []}
        for part, path in by_part.items():
            if path and part != "train":
                parts[part] = _classes(folder, path, _sub_folders(path), classes)[1]
    _check_classes(folder, classes, parts["train"])
    if not by_part.get("test") and not by_part.get("val"):
        parts["train"], parts["test"] = _held_out(parts["train"], test_size, seed + 1, "test_size")
    elif not by_part.get("test"):
        log.warning(
            "%s has no test folder: the test is on its validation pictures, which also choose the epoch", folder
        )
        parts["test"] = parts["val"]
    if val_size == 0:
        parts["val"] = []
    elif not by_part.get("val"):
        parts["train"], parts["val"] = _held_out(parts["train"], val_size, seed, "val_size")
    counts = Counter(file.label for file in parts["train"])
    if few := [f"{classes[label]} ({counts[label]})" for label in range(len(classes)) if counts[label] < FEW]:
        log.warning("%s: few pictures to train on: %s", folder, ", ".join(few))
    return Listing(classes, parts)


def decode(folder: Path, listing: Listing, size: int, cached: Path, bad_files: Literal["skip", "refuse"]) -> Cache:
    """Decode all pictures to `size` x `size` pixels, once; later calls only map the file.

    A picture is turned upright and stretched to the square. If all are grey, one channel is kept, else three.

    Args:
        folder: The folder that was listed.
        listing: Its pictures.
        size: Pixels of an edge.
        cached: Folder for the file; made if need be.
        bad_files: Whether pictures that can't be read are left out or refused.

    Raises:
        DatasetError: If a picture can't be read and is refused, or a class loses all, or the cache can't be written.
    """
    key = _key(folder, listing, size)
    images, facts = cached / f"{key}.npy", cached / f"{key}.json"
    try:
        cached.mkdir(parents=True, exist_ok=True)
        with FileLock(cached / f"{key}.lock"):
            if not facts.exists():
                _fill(folder, listing, size, images, facts)
        found: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
        # Copied on write, which PyTorch takes for writable; nothing is ever written.
        pixels = torch.from_numpy(np.load(images, mmap_mode="c"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DatasetError(f"the decoded pictures can't be kept in {cached}: {why}; set --data_dir") from None
    _complain(folder, found, bad_files)
    parts, start = {}, 0
    for part, labels in found["labels"].items():
        parts[part] = pixels[start : start + len(labels)], torch.tensor(labels, dtype=torch.int64)
        start += len(labels)
    left = set(found["labels"]["train"])
    if lost := [name for label, name in enumerate(listing.classes) if label not in left]:
        raise DatasetError(f"{folder}: no picture of {lost[0]} is left to train on")
    if listing.parts["test"] is listing.parts["val"]:
        parts["test"] = parts["val"]
    return Cache(listing.classes, parts, found["mean"], found["std"])


def fit_square(picture: Image.Image, size: int) -> np.ndarray:
    """A picture of mode RGB or RGBA, on white where it is transparent, stretched to (size, size, 3) uint8."""
    if picture.mode == "RGBA":
        ground = Image.new("RGBA", picture.size, "white")
        ground.alpha_composite(picture)
        picture = ground.convert("RGB")
    return np.array(picture.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0))


def printable(text: str) -> str:
    """The text without characters that would command a terminal, or can't be encoded."""
    return "".join(character if character.isprintable() else "?" for character in unicodedata.normalize("NFC", text))


def _sub_folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        hint = "give a folder that holds a sub-folder of pictures for each class"
        raise DatasetError(f"{folder} can't be read: {error.strerror}; {hint}") from None


def _classes(
    root: Path, parent: Path, folders: list[Path], known: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], list[File]]:
    names = [printable(path.name) for path in folders]
    classes = tuple(names) if known is None else known
    files = []
    for name, path in zip(names, folders, strict=True):
        if name not in classes:
            raise DatasetError(f"{path} is a class that the training pictures don't have; remove it, or add it there")
        found = [File(os.path.relpath(file, root), classes.index(name)) for file in sorted(_pictures(path))]
        if not found and known is None:
            raise DatasetError(f"{path} holds no picture; remove it, or put the pictures of that class there")
        files += found
    if known is not None and not files:
        raise DatasetError(f"{parent} holds no pictures in sub-folders named like the classes")
    return classes, files


def _pictures(folder: Path) -> Iterator[Path]:
    """The picture files in a folder and in those within it, each folder once, wherever links lead."""
    seen = set()
    for place, inside, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        yield from (Path(place, name) for name in names if not name.startswith(".") and is_picture_name(name))


def _check_classes(folder: Path, classes: tuple[str, ...], files: list[File]) -> None:
    if not classes:
        loose = " (pictures lie in it directly)" if any(_pictures(folder)) else ""
        raise DatasetError(f"{folder} has no sub-folders{loose}; one for each class, named like it, is expected")
    if len(classes) == 1:
        raise DatasetError(f"{folder} has one class only, {classes[0]}; a network needs two or more to tell apart")
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise DatasetError(f"{folder} has two classes that are both shown as {twice[0]}; rename one")


def _held_out(files: list[File], wanted: int | None, seed: int, setting: str) -> tuple[list[File], list[File]]:
    """Files split into those that stay and those held out, by the same share of each class."""
    share = 0.1 if wanted is None else wanted / max(1, len(files))
    if share >= 1:
        raise DatasetError(f"data.{setting}={wanted} leaves none of the {len(files)} training pictures; lower it")
    generator = torch.Generator().manual_seed(seed)
    out: set[int] = set()
    for label in sorted({file.label for file in files}):
        places = [place for place, file in enumerate(files) if file.label == label]
        # At least one, so that each class is measured; but a class is never emptied.
        count = min(max(1, round(share * len(places))), len(places) - 1) if share else 0
        out.update(places[index] for index in torch.randperm(len(places), generator=generator)[:count].tolist())
    return [file for i, file in enumerate(files) if i not in out], [file for i, file in enumerate(files) if i in out]


def _rows(listing: Listing) -> list[tuple[str, File]]:
    """Each part's pictures in the order of the file; a test on the validation pictures needs no rows of its own."""
    parts = listing.parts
    shared = parts["test"] is parts["val"]
    return [(part, file) for part in parts for file in parts[part] if not (shared and part == "test")]


def _key(folder: Path, listing: Listing, size: int) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, size, listing.classes]).encode())
    for part, file in _rows(listing):
        try:
            status = (folder / file.path).stat()
            stamp = status.st_size, status.st_mtime_ns
        except OSError:
            stamp = 0, 0  # a link that leads nowhere: read as a bad file
        digest.update(repr((part, *file, *stamp)).encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _fill(folder: Path, listing: Listing, size: int, images: Path, facts: Path) -> None:
    """Decode into temporary files, which are renamed when they are whole."""
    rows = _rows(listing)
    temporary = images.with_name(f".{uuid.uuid4().hex}.npy")

    def read(row: tuple[str, File]) -> np.ndarray | str:
        try:
            return fit_square(read_picture(folder / row[1].path, size), size)
        except (PictureError, ValueError) as error:
            return " ".join(str(error).split())

    try:
        pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(rows), 3, size, size))
        labels: dict[str, list[int]] = {part: [] for part in listing.parts}
        bad: list[tuple[str, str]] = []
        hashes: dict[bytes, tuple[str, str]] = {}
        twice: list[tuple[str, str]] = []
        grey, count, total, squares = True, 0, 0.0, 0.0
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with ThreadPoolExecutor(workers) as pool:  # Pillow decodes outside Python's lock
            # In pieces: `map` starts all at once, and would keep what is read faster than it is stored.
            pieces = (pool.map(read, rows[start : start + 500]) for start in range(0, len(rows), 500))
            bar = tqdm(chain.from_iterable(pieces), "Reading pictures", len(rows), unit="", leave=False, disable=None)
            for (part, file), found in zip(rows, bar, strict=True):
                name = printable(file.path)
                if isinstance(found, str):
                    bad.append((name, found))
                    continue
                pixels[count] = found.transpose(2, 0, 1)
                grey = grey and bool((found == found[..., :1]).all())
                if part == "train":
                    total += found.sum(dtype=np.float64) / 255
                    squares += np.square(found / 255).sum()
                first = hashes.setdefault(hashlib.sha256(found.tobytes()).digest(), (part, name))
                if "train" in (first[0], part) and first[0] != part:
                    twice.append((first[1], name))
                labels[part].append(file.label)
                count += 1
        numbers = max(1, len(labels["train"])) * 3 * size * size
        mean = total / numbers
        std = max(squares / numbers - mean**2, 0.0) ** 0.5 or 1.0
        pixels.flush()
        shape = (count, 1 if grey else 3, size, size)
        if shape != pixels.shape:
            less = temporary.with_suffix(".less")
            kept = np.lib.format.open_memmap(less, "w+", np.uint8, shape)
            for start in range(0, count, 1000):
                kept[start : start + 1000] = pixels[start : min(start + 1000, count), : shape[1]]
            kept.flush()
            less.replace(temporary)
        temporary.replace(images)
        content = {"labels": labels, "mean": mean, "std": std, "bad": bad, "twice": twice}
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(facts)
    finally:
        temporary.unlink(missing_ok=True)
        temporary.with_suffix(".less").unlink(missing_ok=True)


def _complain(folder: Path, found: dict[str, Any], bad_files: str) -> None:
    """Name the pictures that can't be read, and those that training and evaluation share."""
    if bad := found["bad"]:
        named = "; ".join(f"{name} {why}" for name, why in bad[:3]) + ("; ..." if len(bad) > 3 else "")
        if bad_files == "refuse":
            raise DatasetError(f"{len(bad):,} pictures in {folder} can't be read: {named}; or --data.bad_files skip")
        log.warning("%s: %s pictures can't be read and are left out: %s", folder, f"{len(bad):,}", named)
    if twice := found["twice"]:
        named = "; ".join(f"{one} and {other}" for one, other in twice[:3]) + ("; ..." if len(twice) > 3 else "")
        log.warning(
            "%s: %s pictures are both trained on and measured on, which flatters the result: %s",
            folder,
            f"{len(twice):,}",
            named,
        )
