"""Reading the `record.json` files that runs leave behind, and folding runs that differ only in their seed.

Imports nothing heavy.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from errors import UserError

# Settings outside `model` and `data` that change what is computed.
SHAPING = (
    "patience",
    "pretrained",
    "stop_at_chance",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.precision",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "trainer.limit_train_batches",
    "trainer.overfit_batches",
    "trainer.callbacks",
)
# Settings inside them that don't, or that follow another one.
IMMATERIAL = (
    "data.data_dir",
    "data.num_workers",
    "data.eval_batch_size",
    "data.dataset_on_device",
    "model.compile",
    "model.checkpoint_activations",
    "model.channels_last",
    "model.net.init_args.image_size",
)
SWEEPS = "sweeps"  # where sweep.py keeps its trials, within the folder of the runs
# The machine decides these where they are left open.
OPEN = {"trainer.precision": None, "trainer.devices": "auto"}


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
        return self.record["seed"]

    @property
    def finished(self) -> bool:
        """Whether it was trained to the end and tested."""
        return "test" in self.record and "fit_seconds" in self.record

    @property
    def accuracy(self) -> float:
        """Test accuracy, 0 to 1."""
        return self.record["test"]["accuracy"]

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
        return settings(self.record["config"])


@dataclass
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        runs: At least one, in the order of their seeds.
        name: The recipe, and what tells the group from other groups of that recipe.
    """

    runs: list[Run]
    name: str = field(default="")

    def mean(self, key: str) -> float | None:
        """Mean of a number that the records hold, or None if one lacks it."""
        values = [run.record.get(key) for run in self.runs]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if len(known) == len(values) else None

    @property
    def accuracy(self) -> float:
        """Mean test accuracy, 0 to 1."""
        return statistics.fmean(run.accuracy for run in self.runs)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the test accuracy between seeds (n - 1), or None with a single seed."""
        return statistics.stdev(run.accuracy for run in self.runs) if len(self.runs) > 1 else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean accuracy that the number of test images allows."""
        return wilson(self.accuracy, min(run.record["test"]["images"] for run in self.runs))

    @property
    def epoch_seconds(self) -> float:
        """Mean time of an epoch's training batches."""
        return statistics.fmean(run.epoch_seconds for run in self.runs)

    @property
    def class_accuracy(self) -> dict[str, float]:
        """Mean test accuracy of each class."""
        tables = [run.record["test"].get("class_accuracy", {}) for run in self.runs]
        return {name: statistics.fmean(table[name] for table in tables if name in table) for name in tables[0]}

    def curve(self, metric: str) -> list[tuple[int, float, float, float]]:
        """Epoch, mean, lowest and highest value of a metric, for the epochs that all runs have."""
        tables = [
            {epoch["epoch"]: epoch[metric] for epoch in run.record["epochs"] if metric in epoch} for run in self.runs
        ]
        shared = sorted(set.intersection(*(set(table) for table in tables)))
        columns = [(number, [table[number] for table in tables]) for number in shared]
        return [(number, statistics.fmean(values), min(values), max(values)) for number, values in columns]


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that decides what is computed, seed left out, under dotted names.

    What is off (null, false, 0) is left out: a setting that came later says nothing about older runs.
    """
    return {
        name: value
        for name, value in flat(config).items()
        if ((name.startswith(("model.", "data.")) and name not in IMMATERIAL) or name in SHAPING)
        and value not in (None, False)
    }


def matches(run: Run, wanted: dict[str, Any]) -> bool:
    """Whether a run computed what the settings say; what they leave to the machine matches anything."""
    own = run.settings | ({"trainer.precision": run.record["precision"]} if "precision" in run.record else {})
    names = own.keys() | wanted.keys()
    return all(own.get(name) == wanted.get(name) or (name in OPEN and wanted.get(name) == OPEN[name]) for name in names)


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs in folders, searched to any depth, or of single record.json files.

    The trials of a sweep, which are never tested, count only where their own folder is named.

    Raises:
        UserError: If a path does not exist, or a record can't be read.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; the folder of a run, or one that holds runs, was expected")
        files = [path] if path.is_file() else sorted(path.rglob("record.json"))
        files = [file for file in files if SWEEPS not in file.relative_to(path).parts]
        runs |= {file.resolve(): _read(file) for file in files}
    return list(runs.values())


def fold(runs: Sequence[Run]) -> list[Group]:
    """Finished runs in groups that differ in the seed alone, the most accurate first.

    Where one seed was run twice, the newer run counts.
    """
    groups: dict[str, dict[int | None, Run]] = {}
    for run in sorted(runs, key=lambda run: run.modified):
        groups.setdefault(json.dumps([run.recipe, _identity(run)], sort_keys=True), {})[run.seed] = run
    folded = [Group(sorted(group.values(), key=lambda run: (run.seed is None, run.seed))) for group in groups.values()]
    for group in folded:
        group.name = _name(group, [other for other in folded if other.runs[0].recipe == group.runs[0].recipe])
    return sorted(folded, key=lambda group: -group.accuracy)


def wilson(accuracy: float, images: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share that was measured on so many images.

    E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22(158), 1927.
    """
    centre = accuracy + z * z / (2 * images)
    half = z * math.sqrt(accuracy * (1 - accuracy) / images + z * z / (4 * images * images))
    scale = 1 + z * z / images
    return (centre - half) / scale, (centre + half) / scale


def _read(file: Path) -> Run:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        run = Run(file.parent, record, file.stat().st_mtime)
        if not isinstance(record["epochs"], list) or not run.settings:
            raise TypeError
        _ = run.recipe, run.seed, run.machine
        if run.finished:
            _ = run.accuracy, run.epoch_seconds, record["test"]["images"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, statistics.StatisticsError):
        raise UserError(f"{file} is damaged or is not the record of a run; mend or remove it") from None
    return run


def _identity(run: Run) -> dict[str, Any]:
    found = {name: value for name, value in run.settings.items() if name not in OPEN}
    return found | {"precision": run.record["precision"], "machine": run.machine}


def _name(group: Group, same_recipe: list[Group]) -> str:
    """The recipe, and the settings in which it differs from the other groups of its recipe."""
    first = group.runs[0]
    mine, others = _identity(first), [_identity(other.runs[0]) for other in same_recipe]
    written = flat(first.record["config"]) | mine
    parts = []
    for name in dict.fromkeys(name for other in others for name in other):
        differs = any(other.get(name) != mine.get(name) for other in others)
        if differs and written.get(name) is not None:
            parts.append(f"{name.rpartition('.')[2]} {_short(written[name])}")
    return f"{first.recipe} ({', '.join(parts)})" if parts else first.recipe


def _short(value: Any) -> Any:
    """A list of objects, such as callbacks, as the names of their classes; anything else as it is."""
    if isinstance(value, list) and all(isinstance(one, dict) and "class_path" in one for one in value):
        return ", ".join(one["class_path"].rpartition(".")[2] for one in value)
    return value


def flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name and value of what nested mappings hold."""
    leaves: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
