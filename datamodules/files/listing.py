"""Which pictures a folder holds, one sub-folder a class, and which of them are held out."""

import hashlib
import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from datamodules.files.finding import DatasetError
from datamodules.files.pictures import OUTPUTS, is_hidden, is_picture_name, pictures_below
from errors import count, is_first_process

# Usual names of the sub-folders that split a data set, lower case.
NAMES = {
    "train": {"train", "training", "train_set", "training_set", "trainset"},
    "val": {"val", "valid", "validation", "dev", "eval", "evaluation", "val_set", "validation_set", "valset"},
    "test": {"test", "testing", "test_set", "testset"},
}
# What runs leave, in logs and outputs.
RUNS = (
    *("version_*/config.yaml", "*/version_*/config.yaml", "*/*/version_*/config.yaml"),
    *(".compare.lock", "predict_*/predictions*.csv"),
    *(f"{start}*/{name}" for start in ("predict_", "comparison", "sweeps") for name in OUTPUTS[start]),
)
FEW = 5  # pictures of a class, with which little can be learned or measured
log = logging.getLogger(__name__)


class File(NamedTuple):
    """One picture: its path within the folder (its place in a set of torchvision's), and its class."""

    path: str
    label: int


class Listing(NamedTuple):
    """The classes, in order, and the pictures of each part: train, val and test."""

    classes: tuple[str, ...]
    parts: dict[str, list[File]]


def list_folder(
    folder: Path,
    val_size: int | None,
    test_size: int | None,
    seed: int,
    known: tuple[str, ...] | None = None,
    cached: Path | None = None,
) -> Listing:
    """Find classes and pictures, and split them where the folder does not.

    Args:
        folder: Holds a sub-folder for each class, or train, val and test folders that do, or a val or a test one alone.
        val_size: Pictures held out for validation where there is no such folder; None takes a tenth, 0 none at all.
        test_size: The same for the test.
        seed: Of the split.
        known: The classes of the network that is to be measured; a test folder alone may lack some.
        cached: Folder of the decoded pictures; that it may lie in `folder` makes no class of it.

    Raises:
        DatasetError: If that is not what the folder holds.
    """

    def class_folders(of: Path) -> list[Path]:
        return [path for path in _sub_folders(of) if not _left_by_runs(path, cached)]

    inside = class_folders(folder)
    by_part = {part: next((path for path in inside if path.name.lower() in NAMES[part]), None) for part in NAMES}
    train = by_part["train"]
    alone = len(inside) == 1 and (by_part["val"] or by_part["test"])
    if alone and len(of_part := class_folders(inside[0])) > (0 if known else 1):
        classes, files = _classes(folder, inside[0], of_part, known)
        _check_classes(folder, classes, files)
        return Listing(classes, {"train": [], "val": files, "test": files})  # to measure a network on, all of them
    # Kaggle's test1, say, which is no part, but no class beside train either.
    strange = [path.name for path in inside if printable(path.name) not in (known or ())]
    like_test = any(name.lower().rstrip("0123456789_-") in NAMES["val"] | NAMES["test"] for name in strange)
    if train and train.name in strange and like_test and not _sub_folders(train):
        raise DatasetError(f"{train} has no sub-folders; one for each class, named like it, is expected in each part")
    if not (train and (by_part["val"] or by_part["test"] or len(inside) == 1) and _sub_folders(train)):
        _refuse_parts(folder, inside, like_test, known)
        _warn_of_parts(folder, inside)
        classes, files = _classes(folder, folder, inside)
        parts: dict[str, list[File]] = {"train": files, "val": [], "test": []}
        by_part = {}
    else:
        if ignored := [path.name for path in inside if path not in by_part.values()]:
            warn_once(f"{folder}: {', '.join(map(printable, ignored))} beside {train.name} are not used")
        classes, files = _classes(folder, train, class_folders(train))
        parts = {"train": files, "val": [], "test": []}
        for part, path in by_part.items():
            if path and part != "train":
                parts[part] = _classes(folder, path, class_folders(path), classes)[1]
    _check_classes(folder, classes, parts["train"])
    hold_out(str(folder), parts, val_size, test_size, seed)
    counts = Counter(file.label for file in parts["train"])
    if few := [f"{classes[label]} ({counts[label]})" for label in range(len(classes)) if counts[label] < FEW]:
        warn_once(f"{folder}: few pictures to train on: {', '.join(few)}")
    return Listing(classes, parts)


def hold_out(name: str, parts: dict[str, list[File]], val_size: int | None, test_size: int | None, seed: int) -> None:
    """Give `parts` a test and a validation part where they are empty; see `list_folder`."""
    if not parts["test"] and not parts["val"]:
        parts["train"], parts["test"] = _held_out(parts["train"], test_size, seed + 1, "test_size")
    elif not parts["test"]:
        choosing = "" if val_size == 0 else ", which also choose the epoch"
        warn_once(f"{name} has no test pictures: the test is on the validation ones{choosing}")
        parts["test"] = parts["val"]
    if val_size == 0:
        parts["val"] = []
    elif not parts["val"]:
        parts["train"], parts["val"] = _held_out(parts["train"], val_size, seed, "val_size")


@cache
def warn_once(message: str) -> None:
    """Warn, once in a run: on its first process alone, and not again when the pictures are looked at again."""
    if is_first_process():
        log.warning(message)


def printable(text: str) -> str:
    """The text without characters that would command a terminal, or can't be encoded."""
    return "".join(character if character.isprintable() else "?" for character in unicodedata.normalize("NFC", text))


def listed(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(map(printable, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _composed(name: str) -> str:
    """One spelling of a name: systems and tools differ in whether an accent is a character of its own."""
    return unicodedata.normalize("NFC", name)


def _left_by_runs(folder: Path, cached: Path | None) -> bool:
    """Whether a folder is none of the pictures', but made by runs that were started beside them."""
    drawn = False
    try:
        for picture in pictures_below(folder):
            places = picture.relative_to(folder).parts[:-1]
            if not any(place.startswith(tuple(OUTPUTS)) for place in places):
                return False
            drawn = True
    except PermissionError:
        return False  # whoever needs it says so
    if any(path for pattern in RUNS for path in folder.glob(pattern)):
        warn_once(f"{folder} holds runs, and is left out")
        return True
    return not drawn and cached is not None and cached.resolve().is_relative_to(folder.resolve())


def _refuse_parts(folder: Path, inside: list[Path], like_test: bool, known: tuple[str, ...] | None) -> None:
    """A part beside anything but parts would become a class: the network would tell training from test pictures."""
    for path in (path for path in inside if printable(path.name) not in (known or ())):
        part = next((part for part, names in NAMES.items() if path.name.lower() in names), "")
        holding = [one for one in _sub_folders(path) if any(pictures_below(one))] if part else []
        if len(holding) > 1 or (part == "train" and like_test):
            hint = f"move {listed([one.name for one in inside if one != path])} out of {folder}"
            if part != "train" and not known:
                hint = f"add a train folder beside it, or move it out of {folder}"
            raise DatasetError(f"{path} looks like a part, not like a class; {hint}; or rename it, if it is a class")


def _warn_of_parts(folder: Path, inside: list[Path]) -> None:
    """Folders that all hold the same ones are rather parts with unusual names than classes."""
    below = [{path.name for path in _sub_folders(one)} for one in inside]
    if len(inside) > 1 and len(same := set.intersection(*below)) > 1:
        names, folders = listed([path.name for path in inside]), listed(sorted(same))
        warn_once(f"{folder}: {names} all hold {folders}, but are taken for classes; parts are called train, val, test")


def _sub_folders(folder: Path) -> list[Path]:
    try:
        found = (path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
        return sorted(found, key=lambda path: _composed(path.name))  # Windows would compare paths in lower case
    except OSError as error:
        hint = "give a folder that holds a sub-folder of pictures for each class"
        raise DatasetError(f"{folder} can't be read: {error.strerror}; {hint}") from None


def _classes(
    root: Path, parent: Path, folders: list[Path], known: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], list[File]]:
    pictures = sorted(path.name for path in parent.iterdir() if is_picture_name(path.name) and not is_hidden(path.name))
    if folders and (loose := [name for name in pictures if (parent / name).is_file()]):
        left_out = printable(loose[0]) + (", ..." if len(loose) > 1 else "")
        warn_once(f"{parent}: {count(len(loose), 'picture')} outside the classes' folders left out: {left_out}")
    names = [printable(path.name) for path in folders]
    classes = tuple(names) if known is None else known
    files = []
    for name, path in zip(names, folders, strict=True):
        if name not in classes:
            raise DatasetError(f"{path} is a class that the training pictures don't have; remove it, or add it there")
        below = sorted(pictures_below(path), key=lambda file: tuple(map(_composed, file.parts)))
        label = classes.index(name)
        found = [File(file.relative_to(root).as_posix(), label) for file in below]
        if not found and known is None:
            raise DatasetError(f"{path} holds no picture; remove it, or put the pictures of that class there")
        files += found
    if known is not None and not files:
        hint = f"sort them so, or move it out of {root}"
        raise DatasetError(f"{parent} holds no pictures in sub-folders named like the classes; {hint}")
    return classes, files


def _check_classes(folder: Path, classes: tuple[str, ...], files: list[File]) -> None:
    if not classes:
        loose = " (pictures lie in it directly)" if any(pictures_below(folder)) else ""
        raise DatasetError(f"{folder} has no sub-folders{loose}; one for each class, named like it, is expected")
    if len(classes) == 1:
        inner = folder / classes[0]
        nested = inner.is_dir() and len(_sub_folders(inner)) > 1
        hint = f"did you mean {inner}?" if nested else "a network needs two or more to tell apart"
        raise DatasetError(f"{folder} has one class only, {classes[0]}; {hint}")
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise DatasetError(f"{folder} has two classes that are both shown as {twice[0]}; rename one")


def _held_out(files: list[File], wanted: int | None, seed: int, setting: str) -> tuple[list[File], list[File]]:
    """Files split into those that stay and those held out, by the same share of each class."""
    share = 0.1 if wanted is None else wanted / max(1, len(files))
    if share >= 1:
        raise DatasetError(f"data.{setting}={wanted} leaves none of the {len(files)} training pictures; lower it")
    out, by_class = set(), defaultdict(list)
    for file in files:
        by_class[file.label].append(file)
    for of_class in by_class.values():
        # At least one, so that each class is measured; but a class is never emptied.
        count = min(max(1, round(share * len(of_class))), len(of_class) - 1) if share else 0
        out.update(sorted(of_class, key=lambda file: _lot(file, seed))[:count])
    return [file for file in files if file not in out], [file for file in files if file in out]


def _lot(file: File, seed: int) -> bytes:
    """A random number of the file's own, so that it stays in its part when others come and go."""
    return hashlib.sha256(f"{seed} {_composed(file.path)}".encode(errors="surrogatepass")).digest()
