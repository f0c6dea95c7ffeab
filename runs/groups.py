"""Runs that differ only in their seed, combined into one."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from runs.names import MACHINE, name_all
from runs.reading import Run
from runs.settings import kind, leaves

Z = 1.959964  # so many standard deviations to either side hold 95 % of a normal distribution


@dataclass
class Group:
    """Runs that differ only in their seed.

    Attributes:
        runs: At least one, in the order of their seeds.
        name: The recipe, and what was changed in it.
        shared: What was changed in all groups, and is in no name.
    """

    runs: list[Run]
    name: str = field(default="")
    shared: list[str] = field(default_factory=list)

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
    def marked(self) -> str:
        """Its name, with a mark if it is partial."""
        return self.name + "*" * bool(self.partial)

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


def by_data(runs: Sequence[Run]) -> dict[str, list[Group]]:
    """The same as `fold` for each data set: what was tested on different images can't be compared."""
    return {data: fold([run for run in runs if run.data == data]) for data in dict.fromkeys(run.data for run in runs)}


def fold(runs: Sequence[Run]) -> list[Group]:
    """Finished runs in groups that differ only in the seed, the most accurate first.

    Where one seed was run twice, the newer run counts; runs without a seed all count.
    """
    groups: dict[str, dict[Any, Run]] = {}
    for run in sorted(runs, key=lambda run: run.modified):
        same = groups.setdefault(json.dumps([run.recipe, _identity(run)], sort_keys=True), {})
        same[run.seed, id(run) if run.seed is None else 0] = run
    folded = [
        Group(sorted(group.values(), key=lambda run: (run.seed is None, run.seed or 0))) for group in groups.values()
    ]
    names, shared = name_all([(group.runs[0].recipe, _settings(group.runs[0])) for group in folded])
    for group, name in zip(folded, names, strict=True):
        # Two classes may have one name, in different modules.
        group.name = name if names.count(name) == 1 else f"{name} in {group.runs[0].folder.as_posix()}"
        group.shared = shared
    return sorted(folded, key=lambda group: -group.accuracy)


def marks(groups: Sequence[Group]) -> list[str]:
    """What was changed in all groups, and which were trained or tested in part: belongs beside their names."""
    lines = [f"Changed in {_those(groups)}: {', '.join(groups[0].shared)}."] if groups[0].shared else []
    for reason in dict.fromkeys(", ".join(group.partial) for group in groups if group.partial):
        numbers = [number for number, group in enumerate(groups, 1) if ", ".join(group.partial) == reason]
        lines.append(f"* partial, {reason}: {f'# {ranges(numbers)}' if len(groups) > len(numbers) else _those(groups)}")
    return lines


def _those(groups: Sequence[Group]) -> str:
    return "all runs" if sum(len(group.runs) for group in groups) > 1 else "the run"


def ranges(numbers: Sequence[int]) -> str:
    """'1-3, 5'."""
    known = sorted(set(numbers))
    ends = [known[0], *(one for pair in pairwise(known) if pair[1] > pair[0] + 1 for one in pair), known[-1]]
    pairs = zip(ends[::2], ends[1::2], strict=True)
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in pairs)


def wilson(accuracy: float, images: int) -> tuple[float, float]:
    """95 % interval of a share that was measured on this many images.

    E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22(158), 1927.
    """
    centre = accuracy + Z * Z / (2 * images)
    half = Z * math.sqrt(accuracy * (1 - accuracy) / images + Z * Z / (4 * images * images))
    scale = 1 + Z * Z / images
    return (centre - half) / scale, (centre + half) / scale


def _identity(run: Run) -> dict[str, Any]:
    found = {name: value for name, value in run.settings.items() if not kind(name).left_open}
    return found | {"precision": run.record["precision"], "machine": run.machine}


def _settings(run: Run) -> dict[str, Any]:
    """What a name may tell: like `_identity`, with what is off, and without what tells data sets apart."""
    found = {name: value for name, value in leaves(run.record["config"]).items() if kind(name).parts}
    return found | {"trainer.precision": run.record["precision"], MACHINE: run.machine}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
