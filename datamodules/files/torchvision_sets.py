"""torchvision's data sets by name, and classes like them: fetched, checked and read by their own code, decoded once."""

import contextlib
import hashlib
import inspect
import json
import re
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torchvision
from PIL import Image
from torchvision.datasets import caltech, mnist, pcam, utils

from datamodules.files.decoding import VERSION, Cache, Fit, decode, fit_square
from datamodules.files.download import TIMEOUT
from datamodules.files.finding import DatasetError, locked
from datamodules.files.listing import File, Listing, hold_out, printable
from errors import after_failed_fetch, one_line, replace_file, writable

NEEDS = {"svhn": ["scipy"], "flowers102": ["scipy"], "caltech101": ["scipy"], "pcam": ["h5py"]}
# Sets in which each picture has one class. The name is the class's in lower case; of EMNIST also with a split.
EMNIST = {"emnist": "balanced", "emnist_letters": "letters", "emnist_digits": "digits", "emnist_byclass": "byclass"}
CLASSES = (
    *("MNIST", "KMNIST", "QMNIST", "USPS", "SEMEION", "SVHN", "CIFAR10", "CIFAR100", "STL10", "EuroSAT", "GTSRB"),
    *("PCAM", "Imagenette", "Food101", "Flowers102", "DTD", "OxfordIIITPet", "FGVCAircraft", "Country211"),
    *("RenderedSST2", "Caltech101", "Caltech256", "SUN397"),
)
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name.lower(): (name, {}) for name in CLASSES},
    **{name: ("EMNIST", {"split": split}) for name, split in EMNIST.items()},
}
EXTRACTING = (utils, caltech, mnist)  # torchvision's modules that hold the function which extracts
SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}
SMALL = 128  # pixels: sets whose pictures all are squares of one size, up to this, are kept in that size
PROBES = 16  # pictures of each part that are looked at beforehand


def read_data_set(
    name: str,
    image_size: int,
    stored_size: int | None,
    fit: Fit,
    data_dir: Path,
    bad_files: Literal["skip", "refuse"],
    val_size: int | None,
    test_size: int | None,
    seed: int,
) -> Cache:
    """Fetch, check and read a data set as its own class does, and decode its pictures, once.

    They are kept until the labels, the number of pictures, or one of the few that are compared change.

    Args:
        name: One of `NAMED`, or the dotted path of a class like torchvision's: made with a folder and, if it takes
            them, `train` or `split` and `download`, it gives a picture and its label, a whole number, for each index.
        image_size: Pixels of the images that the network sees.
        stored_size: Pixels of a stored picture's edge; None takes that of small pictures themselves, or `image_size`.
        fit: As for `fit_square`.
        data_dir: Folder of the data set's files; what is decoded goes into `cache` there, or, if that can't be
            written, into data/cache.
        bad_files: Whether pictures that can't be read are left out or refused.
        val_size: As for `list_folder`.
        test_size: As for `list_folder`.
        seed: Of the split.

    Raises:
        DatasetError: If there is no such set, or it can't be had or used.
    """
    sets, labels, looked_at = _opened(name, data_dir)
    present = sorted(set(labels["train"]))
    own: Any = next((names for key in ("classes", "categories") if (names := getattr(sets["train"], key, None))), ())
    named = own if present and present[0] >= 0 and present[-1] < len(own) else {label: label for label in present}
    # ImageNet's have several names each.
    names = [printable(str(one[0] if isinstance(one := named[label], tuple) else one)) for label in present]
    times = Counter(names)
    classes = tuple(f"{one} {label}" if times[one] > 1 else one for one, label in zip(names, present, strict=True))
    if len(set(classes)) < max(2, len(classes)):
        raise DatasetError(f"{name} has the classes {', '.join(classes)}; two or more, all different, were expected")
    parts: dict[str, list[File]] = {part: [] for part in SPLITS}
    for part, values in labels.items():
        if strange := set(values) - set(present):
            raise DatasetError(f"{name} has the label {min(strange)} in {part}, which its training pictures don't have")
        parts[part] = [File(f"{part}/{index}", present.index(label)) for index, label in enumerate(values)]
    hold_out(name, parts, val_size, test_size, seed)
    sizes = {picture.size for picture in looked_at}
    width, height = next(iter(sizes), (0, 0))
    size = stored_size or (width if len(sizes) == 1 and width == height <= SMALL else image_size)

    def read(file: File) -> np.ndarray:
        part, _, index = file.path.partition("/")
        try:
            picture = _picture(sets[part][int(index)][0])
        except Exception as error:  # raised by the class
            raise ValueError(f"can't be read: {error}") from None
        # EMNIST's letters lie on their sides, mirrored.
        return fit_square(picture.transpose(Image.Transpose.TRANSPOSE) if name in EMNIST else picture, size, fit)

    digest = hashlib.sha256(json.dumps([VERSION, name, torchvision.__version__, size, fit, classes]).encode())
    digest.update(repr(parts).encode())
    for picture in looked_at:
        digest.update(picture.tobytes())
    stem = data_dir / "cache" / digest.hexdigest()[:32]
    if not stem.with_suffix(".json").exists() and not writable(stem):  # a set that many share
        stem = Path("data", "cache", stem.name)
    return decode(name, Listing(classes, parts), read, size, stem, bad_files, parallel=name in NAMED)


def _class_of(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    if name in NAMED:
        known, settings = NAMED[name]
        return getattr(torchvision.datasets, known), settings
    if "." not in name:
        raise DatasetError(f"there is no data set {name}; give a folder, a class's path or one of {', '.join(NAMED)}")
    try:
        found = resolve_name(":".join(name.rsplit(".", 1)))
    except (ImportError, AttributeError, ValueError) as error:
        raise DatasetError(f"the data set {name} can't be imported: {error}") from None
    if not isinstance(found, type):
        raise DatasetError(f"{name} is no class; a data set like torchvision's was expected")
    return found, {}


@cache
def _opened(name: str, data_dir: Path) -> tuple[dict[str, Any], dict[str, list[int]], list[Image.Image]]:
    """The set's parts that there are, fetched if they are missing; the labels of each; and a few pictures."""
    needed = [package for package in NEEDS.get(name, ()) if package not in sys.modules]
    if missing := [package for package in needed if not find_spec(package)]:  # before anything is fetched
        raise DatasetError(f"{name} needs more packages: pip install {' '.join(missing)}")
    make, settings = _class_of(name)
    takes = {key for one in getattr(make, "__mro__", [make]) for key in _parameters(one)}
    if "download" in takes:
        settings = settings | {"download": True}
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        shared = NAMED[name][0] if name in NAMED else name.rpartition(".")[2]  # EMNIST's four have one archive
        with locked(data_dir / f".{shared.lower()}.lock"), _quiet_and_limited():
            if "train" in takes:
                sets = {part: make(data_dir, train=part == "train", **settings) for part in ("train", "test")}
            elif "split" in takes and "split" not in settings:
                parts = {part: _first(make, data_dir, words, settings) for part, words in SPLITS.items()}
                sets = {part: one for part, one in parts.items() if one is not None}
            else:
                sets = {"train": make(data_dir, **settings)}
        if not sets.get("train") or any(len(one) == 0 for one in sets.values()):
            raise DatasetError(f"{name} has no pictures to train on, or none to test on")
    except DatasetError:
        raise
    except ImportError as error:
        raise DatasetError(f"{name} needs a package that is not installed: {error}") from None
    except Exception as error:  # torchvision and the classes of others raise anything
        why = one_line(str(error)) or type(error).__name__
        first = after_failed_fetch(why, "get online")
        raise DatasetError(
            f"{name} can't be read from {data_dir} or fetched: {why[:400]}; {first}, or put its files there as "
            "torchvision lays them out, or remove what is there of it"
        ) from None
    found = {part: _labels(name, one) for part, one in sets.items()}
    pictures = [picture for _, few in found.values() for picture in few]
    return sets, {part: labels for part, (labels, _) in found.items()}, pictures


def _parameters(made: Any) -> Sequence[str]:
    try:
        return list(inspect.signature(made).parameters)
    except (TypeError, ValueError):  # of classes written in C
        return []


def _first(make: Callable[..., Any], data_dir: Path, words: Sequence[str], settings: dict[str, Any]) -> Any:
    """The part under the first of these words that the class knows; None if it knows none."""
    for word in words:
        try:
            return make(data_dir, split=word, **settings)
        except ValueError as error:
            if not re.search(rf"\b{word}\b", str(error)):  # "Unknown value 'val' for argument split"
                raise
    return None


@contextlib.contextmanager
def _quiet_and_limited() -> Iterator[None]:
    """Nothing on standard output, no server waited for without end, and archives extracted whole or not at all."""
    before, extract, decompress = socket.getdefaulttimeout(), utils.extract_archive, utils._decompress
    socket.setdefaulttimeout(TIMEOUT)
    for module in EXTRACTING:
        module.extract_archive = partial(_extract_whole, extract)
    pcam._decompress = partial(_decompress_whole, decompress)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)
        for module in EXTRACTING:
            module.extract_archive = extract
        pcam._decompress = decompress


def _extract_whole(
    extract: Callable[..., Any],
    from_path: str | Path,
    to_path: str | Path | None = None,
    remove_finished: bool = False,
) -> str | Path:
    """Extract into a temporary folder first: torchvision takes what an interruption has left for the whole set."""
    place, prefix = Path(to_path or Path(from_path).parent), f".extracting-{Path(from_path).name}-"
    place.mkdir(parents=True, exist_ok=True)
    for left in place.glob(f"{prefix}*"):  # by a process that was killed; the set is locked
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=prefix, dir=place) as folder:
        extracted = extract(from_path, folder, remove_finished)
        _move_into(Path(folder), place)
    moved = place / Path(extracted).relative_to(folder)
    return str(moved) if isinstance(from_path, str) else moved


def _move_into(folder: Path, place: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and (place / path.name).is_dir():  # of another archive of the set
            _move_into(path, place / path.name)
        else:
            replace_file(path, place / path.name)


def _decompress_whole(
    decompress: Callable[..., Any], from_path: str, to_path: str | None = None, remove_finished: bool = False
) -> None:
    to_path = to_path or str(Path(from_path).with_suffix(""))
    decompress(from_path, f"{to_path}.partial", remove_finished)
    replace_file(Path(f"{to_path}.partial"), Path(to_path))


def _labels(name: str, one: Any) -> tuple[list[int], list[Image.Image]]:
    """All labels, from where torchvision's classes keep them if that is right for a few; and those few pictures."""
    places = np.unique(np.linspace(0, len(one) - 1, PROBES).round().astype(int)).tolist()
    pictures = []
    try:
        few = dict(_readable(one, places))
        if isinstance(one, pcam.PCAM):  # its labels lie in a file, which is opened again for each picture
            with one.h5py.File(one._base_folder / one._FILES[one._split]["targets"][0]) as file:
                one._labels = file["y"][:, 0, 0, 0]
        found = [label for _, label in few.values()]
        for picture, _ in few.values():
            with contextlib.suppress(OSError):  # of a broken file, which is named when all are read
                pictures.append(_picture(picture))
        for attribute in ("targets", "labels", "_labels", "y", "_samples"):
            values = getattr(one, attribute, None)
            if values is not None and len(values) == len(one):
                values = [value[1] for value in values] if attribute == "_samples" else values
                values = np.asarray(values, dtype=object).tolist()
                if [values[place] for place in few] == found:
                    break
        else:
            values = [one[place][1] for place in range(len(one))]
        labels = [int(value) for value in values]
        if labels != values:
            raise TypeError(f"its labels are {type(values[0]).__name__}s; whole numbers were expected")
    except Exception as error:  # raised by the class
        raise DatasetError(f"{name} can't be used: {' '.join(str(error).split()) or type(error).__name__}") from None
    return labels, pictures


def _readable(one: Any, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Places whose files are not broken, and their examples; OSError where all are, as the set itself is at fault."""
    broken: list[OSError] = []
    for place in places:
        try:
            yield place, one[place]
        except OSError as error:
            broken.append(error)
    if len(broken) == len(places):
        raise broken[0]


def _picture(picture: Any) -> Image.Image:
    """A picture of any kind, as Pillow's."""
    if isinstance(picture, Image.Image):
        picture.load()  # files may be read only now
        return picture if picture.mode in ("L", "RGB", "RGBA") else picture.convert("RGB")
    values = np.asarray(picture)
    if values.dtype != np.uint8 or values.ndim not in (2, 3):
        raise TypeError(f"it gives a {type(picture).__name__} of {values.dtype} where a picture was expected")
    return Image.fromarray(values)
