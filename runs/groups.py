"""Runs that differ only in their seed, combined into one."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runs.reading import Run
from runs.settings import flat, kind


@dataclass
class Group:
    """Runs that differ only in their seed.

    Attributes:
        runs: At least one, in the order of their seeds.
        name: The recipe, and what distinguishes the group from other groups of that recipe.
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
        return wilson(self.accuracy, min(run.tested for run in self.runs))

    @property
    def partial(self) -> list[str]:
        """What its runs lack of the whole training and test, in words."""
        return list(dict.fromkeys(reason for run in self.runs for reason in run.partial))

    @property
    def epoch_seconds(self) -> float:
        """Mean time of an epoch's training batches."""
        return statistics.fmean(run.epoch_seconds for run in self.runs)

    @property
    def class_accuracy(self) -> dict[str, float]:
        """Mean test accuracy of each class."""
        tables = [run.record["test"].get("class_accuracy") or {} for run in self.runs]
        names = dict.fromkeys(name for table in tables for name in table)
        return {name: statistics.fmean(table[name] for table in tables if name in table) for name in names}

    def curve(self, metric: str) -> list[tuple[int, float, float, float]]:
        """Epoch, mean, lowest and highest value of a metric, for the epochs that all runs have."""
        tables = [
            {epoch["epoch"]: _finite(epoch[metric]) for epoch in run.record["epochs"] if metric in epoch}
            for run in self.runs
        ]
        shared = sorted(set.intersection(*(set(table) for table in tables)))
        columns = [(number, [table[number] for table in tables]) for number in shared]
        return [(number, statistics.fmean(values), min(values), max(values)) for number, values in columns]


def fold(runs: Sequence[Run]) -> list[Group]:
    """Finished runs in groups that differ only in the seed, the most accurate first.

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
    """95 % interval of a share that was measured on this many images.

    E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22(158), 1927.
    """
    centre = accuracy + z * z / (2 * images)
    half = z * math.sqrt(accuracy * (1 - accuracy) / images + z * z / (4 * images * images))
    scale = 1 + z * z / images
    return (centre - half) / scale, (centre + half) / scale


def _identity(run: Run) -> dict[str, Any]:
    found = {name: value for name, value in run.settings.items() if not kind(name).left_open}
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
        return ", ".join(str(one["class_path"]).rpartition(".")[2] for one in value)
    return value


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
