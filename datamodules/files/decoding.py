"""Pictures decoded once into memory-mapped bytes.

Nothing is written to where they lie. What is made of a folder lies in a cache folder, under a name that stands for its
path and its files' names, sizes and times.
"""

import glob
import hashlib
import json
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from datamodules.files.finding import DatasetError, locked
from datamodules.files.listing import File, Listing, list_folder, printable, warn_once
from datamodules.files.pictures import PictureError, read_picture
from errors import count, one_line, replace_file

VERSION = 4  # of what a cache holds
Fit = Literal["crop", "pad", "stretch"]


class Cache(NamedTuple):
    """The decoded pictures.

    Attributes:
        classes: Their names, in order.
        parts: Images (N, C, S, S) uint8, mapped from the file, and labels (N,) int64 of train, val and test.
        names: The pictures' paths within the folder, or places in the set, of train, val and test.
        mean: Of the training pixels, which lie in 0..1.
        std: Of the training pixels.
    """

    classes: tuple[str, ...]
    parts: dict[str, tuple[Tensor, Tensor]]
    names: dict[str, list[str]]
    mean: float
    std: float


def read_folder(
    folder: Path,
    size: int,
    fit: Fit,
    cached: Path,
    bad_files: Literal["skip", "refuse"],
    val_size: int | None,
    test_size: int | None,
    seed: int,
    known: tuple[str, ...] | None = None,
) -> Cache:
    """List and decode a folder; see `list_folder`, `fit_square` and `decode`."""
    listing = list_folder(folder, val_size, test_size, seed, known, cached)

    def read(file: File) -> np.ndarray:
        return fit_square(read_picture(folder / file.path, size), size, fit)

    return decode(str(folder), listing, read, size, cached / _key(folder, listing, size, fit), bad_files)


def decode(
    name: str,
    listing: Listing,
    read: Callable[[File], np.ndarray],
    size: int,
    stem: Path,
    bad_files: Literal["skip", "refuse"],
    parallel: bool = True,
) -> Cache:
    """Decode all pictures, once; later calls only map the file. If all are grey, one channel is kept, else three.

    Args:
        name: Of the set, for messages.
        listing: Its pictures.
        read: Gives one as (`size`, `size`, 3) uint8; raises PictureError or ValueError if it can't be read.
        size: Pixels of an edge.
        stem: Path of the files that are made, without their endings; its folder is made if need be.
        bad_files: Whether pictures that can't be read are left out or refused.
        parallel: Whether several threads may read at once.

    Raises:
        DatasetError: If a picture can't be read and is refused, or a class loses all, or the cache can't be written.
    """
    images, facts = stem.with_suffix(".npy"), stem.with_suffix(".json")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with locked(stem.with_suffix(".lock")) as alone:
            found = _kept(images, facts)
            if not found or _mended(listing, read, found["bad"]):
                facts.unlink(missing_ok=True)  # first, so that new pixels never lie beside old labels
                own = f".{stem.name}-{socket.gethostname()}-"
                for path in stem.parent.glob(f"{glob.escape(own)}*") if alone else ():
                    if not _runs(path.name.removeprefix(own).partition(".")[0]):
                        with suppress(PermissionError):
                            path.unlink(missing_ok=True)  # left by a killed process
                # Not shared: there are disks on which a lock excludes nobody, or only those on the same machine.
                temporary = stem.with_name(f"{own}{os.getpid()}.npy")
                found = _fill(listing, read, size, images, facts, temporary, parallel)
        # Copied on write, which PyTorch takes for writable; nothing is ever written.
        pixels = torch.from_numpy(np.load(images, mmap_mode="c"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        where = f"{stem.parent}, where old ones may be removed"
        raise DatasetError(f"the decoded pictures can't be kept in {where}: {why}; set --data_dir") from None
    _complain(name, found, bad_files)
    parts, start = {}, 0
    for part, labels in found["labels"].items():
        parts[part] = pixels[start : start + len(labels)], torch.tensor(labels, dtype=torch.int64)
        start += len(labels)
    left = set(found["labels"]["train"])
    if lost := [one for label, one in enumerate(listing.classes) if label not in left and listing.parts["train"]]:
        raise DatasetError(f"{name}: no picture of {lost[0]} is left to train on")
    if listing.parts["test"] is listing.parts["val"]:
        parts["test"], found["names"]["test"] = parts["val"], found["names"]["val"]
    return Cache(listing.classes, parts, found["names"], found["mean"], found["std"])


def _runs(process: str) -> bool:
    """Whether the process of that number runs on this machine. Windows removes nothing that it has open anyway."""
    if os.name == "nt":
        return False
    try:
        os.kill(int(process), 0)
        return True
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False


def fit_square(picture: Image.Image, size: int, fit: Fit, bars: str = "black") -> np.ndarray:
    """A picture of any mode, on white where it is transparent, as (size, size, 3) uint8.

    Args:
        picture: Of any size.
        size: Pixels of the square's edge.
        fit: "crop" scales the shorter edge to the square's and cuts what is longer, evenly on both sides; "pad" scales
            the longer one and fills up with `bars`; "stretch" does not keep the proportions.
        bars: Their colour.
    """
    picture = on_ground(picture)
    if fit == "crop":
        edge = min(picture.size)
        left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
        picture = picture.crop((left, top, left + edge, top + edge))
    elif fit == "pad":
        longer = max(picture.size)
        inside = max(1, round(picture.width * size / longer)), max(1, round(picture.height * size / longer))
        ground = Image.new("RGB", (size, size), bars)
        scaled = picture.resize(inside, Image.Resampling.BICUBIC, reducing_gap=3.0)
        ground.paste(scaled, ((size - inside[0]) // 2, (size - inside[1]) // 2))
        return np.array(ground)
    return np.array(picture.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0))


def on_ground(picture: Image.Image, colour: str = "white") -> Image.Image:
    """A picture of any mode as RGB, with this colour where it is transparent."""
    if picture.mode == "RGBA":
        ground = Image.new("RGBA", picture.size, colour)
        ground.alpha_composite(picture)
        picture = ground
    return picture.convert("RGB")


def _kept(images: Path, facts: Path) -> dict[str, Any]:
    """What is known of the decoded pictures; empty if there are none, or one of the two files was cut short."""
    try:
        np.load(images, mmap_mode="r")
        return json.loads(facts.read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError):
        return {}


def _rows(listing: Listing) -> list[tuple[str, File]]:
    """Each part's pictures in the order of the file; a test on the validation pictures needs no rows of its own."""
    parts = listing.parts
    shared = parts["test"] is parts["val"]
    return [(part, file) for part in parts for file in parts[part] if not (shared and part == "test")]


def _key(folder: Path, listing: Listing, size: int, fit: Fit) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, size, fit, listing.classes]).encode())
    digest.update(os.fsencode(os.path.realpath(folder)))  # others may hold files of the same names, sizes and times
    for part, file in _rows(listing):
        try:
            status = (folder / file.path).stat()
            stamp = status.st_size, status.st_mtime_ns, status.st_ctime_ns  # the last can't be set back
        except OSError:
            stamp = 0, 0, 0  # a link that leads nowhere: read as a bad file
        digest.update(repr((part, *file, *stamp)).encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _fill(
    listing: Listing,
    reader: Callable[[File], np.ndarray],
    size: int,
    images: Path,
    facts: Path,
    temporary: Path,
    parallel: bool,
) -> dict[str, Any]:
    """Decode into a temporary file, which is renamed when it is whole; returns what `facts` then holds."""
    rows = _rows(listing)
    try:
        pixels: Any = _mapped(temporary, (len(rows), 3, size, size))
        labels: dict[str, list[int]] = {part: [] for part in listing.parts}
        names: dict[str, list[str]] = {part: [] for part in listing.parts}
        bad: list[tuple[str, str]] = []
        hashes: dict[bytes, tuple[str, str]] = {}
        twice: list[tuple[str, str]] = []
        grey, count, total, squares = True, 0, 0.0, 0.0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with ThreadPoolExecutor(cores if parallel else 1) as pool:  # Pillow decodes outside Python's lock
            # In pieces: `map` starts all at once, and would keep what is read faster than it is stored.
            attempt = partial(_attempt, reader)
            pieces = (pool.map(attempt, rows[start : start + 500]) for start in range(0, len(rows), 500))
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
                names[part].append(name)
                count += 1
        numbers = max(1, len(labels["train"])) * 3 * size * size
        mean = total / numbers
        std = max(squares / numbers - mean**2, 0.0) ** 0.5 or 1.0
        pixels.flush()
        shape = (count, 1 if grey else 3, size, size)
        if shape != pixels.shape:
            less = temporary.with_suffix(".less")
            kept: Any = _mapped(less, shape)
            for start in range(0, count, 1000):
                kept[start : start + 1000] = pixels[start : min(start + 1000, count), : shape[1]]
            kept.flush()
            kept = pixels = None  # closes them: Windows renames and removes no file that is mapped
            replace_file(less, temporary)
        pixels = None
        replace_file(temporary, images)
        content = {"labels": labels, "names": names, "mean": mean, "std": std, "bad": bad, "twice": twice}
        text = json.dumps(content)
        temporary.write_text(text, encoding="utf-8")
        replace_file(temporary, facts)
        return json.loads(text)  # the same as whoever reads it later
    finally:
        kept = pixels = None
        temporary.unlink(missing_ok=True)
        temporary.with_suffix(".less").unlink(missing_ok=True)


def _attempt(reader: Callable[[File], np.ndarray], row: tuple[str, File]) -> np.ndarray | str:
    """The picture, or why it can't be read."""
    try:
        return reader(row[1])
    except (PictureError, ValueError) as error:
        return one_line(str(error))


def _mended(listing: Listing, reader: Callable[[File], np.ndarray], bad: list[tuple[str, str]]) -> bool:
    """Whether a picture that could not be read can be read now: permissions and programs change, not only files."""
    names = {name for name, _ in bad}
    rows = [row for row in _rows(listing) if printable(row[1].path) in names] if bad else []
    return any(not isinstance(_attempt(reader, row), str) for row in rows)


def _mapped(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A new file that holds an array of bytes, with room for it: a full disk is an error here, not a crash later."""
    pixels = np.lib.format.open_memmap(file, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return pixels


def _complain(where: str, found: dict[str, Any], bad_files: str) -> None:
    """Name the pictures that can't be read, and those that training and evaluation share."""
    if bad := found["bad"]:
        named = "; ".join(f"{name} {why}" for name, why in bad[:3]) + ("; ..." if len(bad) > 3 else "")
        if bad_files == "refuse":
            raise DatasetError(
                f"{count(len(bad), 'picture')} in {where} can't be read: {named}; or --data.bad_files skip"
            )
        warn_once(f"{where}: {count(len(bad), 'picture')} can't be read; left out: {named}")
    if twice := found["twice"]:
        named = "; ".join(f"{one} and {other}" for one, other in twice[:3]) + ("; ..." if len(twice) > 3 else "")
        shared = f"{count(len(twice), 'picture')} in both training and evaluation, which flatters the result"
        warn_once(f"{where}: {shared}: {named}")
