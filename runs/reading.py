"""Reading the `record.json` files that runs leave behind. Their content is checked, and their texts are made printable.

Imports nothing heavy.
"""

import os
import re
import statistics
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from errors import UserError, count, plain, shown, typed
from runs.names import recipe_settings
from runs.record import read, unpack_right
from runs.settings import FOLLOWING, SAMPLE, kind, of_own_pictures, shaping

LARGEST_SAMPLE = 1_500  # images in the larger part of tests/data; the whole parts hold 60,000 and 10,000
# The callbacks that recipes name.
OF_RECIPES = ("callbacks.distillation.Distillation", "callbacks.ema.EMA", "callbacks.fine_tuning.FreezeFeatures")
# Settings that name classes, and what a checkpoint may name without the user's word; checkpoints/trust.py looks closer.
NAMING = ("model.net", "model.optimizer", "model.scheduler", "trainer.callbacks")
KNOWN = ("models.", "torch.", "torchvision.", "optimizers.", "lit_modules.", "lightning.pytorch.cli.", *OF_RECIPES)
SWEEPS = "sweeps"  # where sweep.py keeps its trials, within the folder of the runs


@dataclass
class Run:
    """One run's folder, its record, and when that was written, in seconds."""

    folder: Path
    record: dict[str, Any]
    modified: float = 0.0

    @property
    def recipe(self) -> str:
        """Name of its recipe."""
        return self.record["recipe"]

    @property
    def seed(self) -> int | None:
        """Its seed."""
        return self.record.get("seed")

    @property
    def finished(self) -> bool:
        """Whether it was trained to the end and tested."""
        return "test" in self.record and self.trained

    @property
    def trained(self) -> bool:
        """Whether it was trained to the end; `train.py fit` tests nothing."""
        return "fit_seconds" in self.record

    @property
    def test_command(self) -> str:
        """What tests it where it was only trained, and notes that in its record; "" if it can't be done from here."""
        parent, checkpoint = self.folder.absolute().parent.as_posix(), self.folder / "checkpoints" / "last.ckpt"
        log_dir = parent.removesuffix(f"/{self.recipe}")
        if log_dir == parent or not checkpoint.is_file() or SWEEPS in self.folder.absolute().parts:
            return ""  # it was moved, has no checkpoint, or is a trial, whose sweep compares without the test images
        flags = [] if shown(log_dir) == "logs" else ["--log_dir", shown(log_dir)]
        flags += of_own_pictures(self._setting("data"))
        named = re.findall(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", str([self._setting(name) for name in NAMING]))
        flags += ["--trust_checkpoint"] if any(not name.startswith(KNOWN) for name in named) else []
        return typed(["python", "train.py", "--ckpt_path", shown(checkpoint), *flags])

    @property
    def is_sample(self) -> bool:
        """Whether the Fashion-MNIST that it was trained on was tests/data's sample."""
        test = self.record.get("test") or {}
        known = [test.get("test_set") or test.get("images"), *map(self.record.get, ("train_images", "val_images"))]
        return any(known) and max(number or 0 for number in known) <= LARGEST_SAMPLE

    @property
    def accuracy(self) -> float:
        """Test accuracy, 0 to 1."""
        return self.record["test"]["accuracy"]

    @cached_property
    def tested(self) -> int:
        """Number of images that it was tested on; worked out where an older record gives the size of the whole set."""
        test, limit = self.record["test"], self._setting("trainer.limit_test_batches")
        images, size = test["images"], self._setting("data.eval_batch_size") or self._setting("data.batch_size")
        if "test_set" in test or not _is_number(limit) or not _is_number(size) or size < 1:
            return images
        each = int(size) * self.record["devices"]
        batches = limit if isinstance(limit, int) else int(limit * -(-images // each))
        return max(1, min(images, batches * each))

    @cached_property
    def data(self) -> str:
        """The data set that it was tested on; the sample of it, say, is another one."""
        whole = self.record["test"].get("test_set") or self.record["test"]["images"]
        name = self._setting("data.folder") or self._setting("data.dataset")
        split = self._setting("data.split_seed") if name else None
        # A digest of their names: the folder may have changed, or the split, which older records have instead.
        drawn = self.record["test"].get("test_pictures") or (f"split {split}" if split else "")
        return f"{name or 'Fashion-MNIST'}, {count(whole, 'test image')}{f' ({drawn})' if drawn else ''}"

    @cached_property
    def right(self) -> list[bool] | None:
        """Which test images it got right, in their order; None if the record does not say."""
        text = self.record["test"].get("right")
        return None if text is None else unpack_right(text, self.record["test"]["images"])

    @cached_property
    def partial(self) -> list[str]:
        """What it lacks of the whole training and test, in words; empty if nothing."""
        short = []
        epochs, wanted = len(self.record["epochs"]), self.record.get("max_epochs") or -1
        whole = max(_epochs_of(self.recipe), wanted)
        if (wanted if self._setting("patience") else epochs) < whole:  # patience may end a whole run early
            short.append(f"{epochs} of {whole} epochs")
        for name in ("limit_train_batches", "overfit_batches"):
            value = self._setting(f"trainer.{name}")
            if value not in (None, 0) and (value != 1 or isinstance(value, int)):  # 1.0 is all, 1 is one batch
                short.append(f"{name} {value}")
        whole = self.record["test"].get("test_set") or self.record["test"]["images"]
        if self.tested < whole:
            short.append(f"{self.tested:,} of {whole:,} test images")
        return short

    @property
    def epoch_seconds(self) -> float:
        """Median time of an epoch's training batches."""
        return statistics.median(epoch["seconds"] for epoch in self.record["epochs"])

    @property
    def machine(self) -> str:
        """What it ran on."""
        machine = self.record["machine"]
        device = machine.get("gpu") or machine["cpu"]
        return device if self.record["devices"] == 1 else f"{self.record['devices']} x {device}"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What was computed, apart from the seed, as dotted names and values."""
        return shaping(self.record["config"])

    def _setting(self, name: str) -> Any:
        value: Any = self.record["config"]
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value


def matches(run: Run, wanted: dict[str, Any], asked_for: Collection[str] = ()) -> bool:
    """Whether a run computed what the settings say; settings left to machine or pictures match anything.

    Args:
        run: The run.
        wanted: Its settings, as `shaping` gives them.
        asked_for: Those that the user decides, and not the pictures.
    """
    wanted = {name: _printable(value) for name, value in wanted.items()}  # as the run's own are
    own = dict(run.settings)
    if own.get("trainer.precision") != wanted.get("trainer.precision"):  # asked for otherwise, and maybe computed so
        own |= {"trainer.precision": run.record["precision"]} if "precision" in run.record else {}
    if SAMPLE in wanted:
        own[SAMPLE] = run.is_sample
    names = own.keys() | wanted.keys()
    if wanted.get("data.folder") or wanted.get("data.dataset"):
        names = {name for name in names if name.replace(".init_args", "") not in FOLLOWING - {*asked_for}}
    return all(_fits(own.get(name), wanted.get(name), kind(name).left_open) for name in names)


def _fits(own: Any, wanted: Any, left_open: tuple[Any, ...]) -> bool:
    return own == wanted or wanted in left_open or (isinstance(wanted, tuple) and own in wanted)


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs in folders, searched to any depth, and of single record.json files.

    The trials of a sweep, which are never tested, count only if their own folder is named.

    Raises:
        UserError: If a path does not exist, or a record can't be read.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; the folder of a run, or one that holds runs, was expected")
        files = [path] if path.is_file() else sorted(_records_below(path))
        files = [file for file in files if SWEEPS not in file.relative_to(path).parts]
        runs |= {file.resolve(): _read(file) for file in files}
    return list(runs.values())


def _records_below(folder: Path) -> Iterator[Path]:
    """The records in a folder and in those within it, each folder once, wherever links lead."""
    seen = set()
    for place, inside, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside.sort(key=lambda name: (Path(place, name).is_symlink(), name))  # a run is called by its own place
        if "record.json" in names:
            yield Path(place, "record.json")


def _read(file: Path) -> Run:
    try:
        record = read(file)
        run = Run(file.parent, _printable(record), file.stat().st_mtime)
        if not run.settings:
            raise ValueError("config must name what was trained")
        if run.finished:
            _ = run.right, run.partial
            if not record["epochs"] or any(epoch.get("seconds") is None for epoch in record["epochs"]):
                raise ValueError("epochs must hold each epoch's seconds")
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{file} is damaged or is not the record of a run ({reason}); repair or remove it") from None
    return run


def _printable(value: Any) -> Any:
    """The same with control characters and the like escaped in all texts and keys."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list):
        return [_printable(one) for one in value]
    if isinstance(value, dict):
        return {plain(key): _printable(one) for key, one in value.items()}
    return value


def _epochs_of(recipe: str) -> int:
    """The number of epochs in one of the project's recipes; -1 if there is no such recipe."""
    epochs = recipe_settings(recipe).get("trainer.max_epochs")
    return epochs if isinstance(epochs, int) else -1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e18
