"""A sweep on the command line: which settings to try, and which values of each.

Imports nothing heavy.
"""

import itertools
import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cli.flags import FLAGS
from cli.recipes import did_you_mean, resolved
from errors import UserError, typed
from runs.record import write_json
from runs.settings import GROUPS, kind, leaves

Check = Callable[[str], str]
# The dotted name, without `init_args`, that each short flag stands for.
TARGETS = {
    flag.lstrip("-"): entry.target.lstrip("-").partition("=")[0].replace(".init_args", "")
    for flag, entry in FLAGS.items()
}
# How the values of some settings are checked.
CHECKS = {target: FLAGS[f"--{flag}"].check for flag, target in TARGETS.items() if target}
PRUNERS = ("median", "hyperband", "none")
# Up to 1 it is a share of the batches; above 1 a number of batches, which must be whole.
OF_BATCHES = ("trainer.limit_train_batches", "trainer.overfit_batches", "trainer.val_check_interval")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Choice:
    """Values as written on the command line."""

    values: tuple[str, ...]


# Dotted name of each setting, without `init_args`, and what to try for it.
Space = dict[str, Range | Choice]


@dataclass
class SweepRequest:
    """A checked command line of sweep.py.

    Attributes:
        recipe: Name or path of the recipe.
        space: What to search.
        spelled: The same, as written on the command line.
        trials: How many settings to try in all.
        pruner: One of `PRUNERS`.
        output: The recipe to write, or None for one beside the trials.
        log_dir: Folder of the runs.
        flags: Flags of train.py.
    """

    recipe: str
    space: Space
    spelled: list[str]
    trials: int
    pruner: str
    output: Path | None
    log_dir: Path
    flags: list[str]

    @property
    def command(self) -> str:
        """The command line, without where the results go."""
        words = [self.recipe, "--space", *self.spelled, "--trials", str(self.trials), "--pruner", self.pruner]
        words += self.flags
        return typed(["python", "sweep.py", *words])


def add_setting(space: Space, setting: str) -> None:
    """Add one setting, KEY=VALUES as on the command line, to a space.

    Raises:
        UserError: If the key is unknown, can't be searched or was given already, or the values make no sense.
    """
    key, equals, values = setting.partition("=")
    key = key.lstrip("-")
    if not equals or not key or not values:
        raise UserError(f"{setting!r} in --space is not KEY=VALUES, such as lr=log:1e-4..1e-2 or batch_size=64,128")
    name = _name(key)
    if fixed := kind(name).fixed:
        raise UserError(f"{key} can't be searched: {fixed}")
    if name in space:
        raise UserError(f"{key} is given twice in --space")
    space[name] = _values(key, values, CHECKS.get(name))


def checked_space(request: SweepRequest, folder: Path) -> Space:
    """The space, with whole numbers where a setting takes those; train.py checks its ends and choices once."""
    notes = folder / "sweep.json"
    if notes.exists():
        whole = json.loads(notes.read_text(encoding="utf-8"))["whole"]
        return {
            name: replace(values, whole=name in whole) if isinstance(values, Range) else values
            for name, values in request.space.items()
        }
    print("Checking the settings", flush=True)
    config = resolved(request.recipe, request.flags)
    trainer = config["trainer"]
    if config["data"]["val_size"] == 0:
        raise UserError("a sweep chooses by validation accuracy: set --val_size above 0")
    if trainer["fast_dev_run"] or trainer["limit_val_batches"] == 0:
        raise UserError("a sweep chooses by validation accuracy: leave out fast_dev_run and limit_val_batches=0")
    if 0 < (trainer["max_epochs"] or 0) < (trainer["check_val_every_n_epoch"] or 1):
        raise UserError(
            "a sweep chooses by validation accuracy: leave out check_val_every_n_epoch, which exceeds the run"
        )
    now = leaves(config)
    space: Space = {}
    for name, values in request.space.items():
        space[name] = values
        if not isinstance(values, Range) or (name in OF_BATCHES and values.whole and values.high > 1):
            continue
        if isinstance(now.get(name), int | float) and not isinstance(now[name], bool):
            if isinstance(now[name], int) and not values.whole:
                raise UserError(f"{name} takes whole numbers, not {values.low:g}..{values.high:g}")
            space[name] = replace(values, whole=isinstance(now[name], int))
        elif values.whole:  # of a setting that is off now
            others = [f"--{other}={_nth(some, 0)}" for other, some in in_order(request.space) if other != name]
            with suppress(UserError):
                resolved(request.recipe, [*request.flags, *others, f"--{name}={values.low + 0.5}"])
                space[name] = replace(values, whole=False)
    unsure = {name: values for name, values in space.items() if not _is_known(values, now.get(name), name)}
    points = max((len(values.values) if isinstance(values, Choice) else 2 for values in unsure.values()), default=0)
    with ThreadPoolExecutor(2) as pool:
        tries = [[f"--{name}={spelled(_nth(values, n))}" for name, values in in_order(space)] for n in range(points)]
        list(pool.map(lambda settings: resolved(request.recipe, [*request.flags, *settings]), tries))
    whole = [name for name, values in space.items() if isinstance(values, Range) and values.whole]
    write_json(notes, {"command": request.command, "whole": whole})
    return space


def _is_known(values: Range | Choice, now: Any, name: str) -> bool:
    """Whether train.py need not check it: the setting is a number already, or was checked on the command line."""
    return isinstance(now, int | float) if isinstance(values, Range) else CHECKS.get(name) is not None


def _nth(values: Range | Choice, number: int) -> float | str:
    if isinstance(values, Choice):
        return values.values[number % len(values.values)]
    end = values.high if number % 2 else values.low
    return int(end) if values.whole else end


def in_order(space: Space) -> list[tuple[str, Range | Choice]]:
    """Sorts a class before its arguments, which it would reset."""
    return sorted(space.items(), key=lambda item: item[0].count("."))


def spelled(value: float | str) -> str:
    """As written on the command line; a recipe needs no more than four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def every_combination(space: Space, most: int) -> list[dict[str, Any]]:
    """All settings that the space holds if there are no more than that; otherwise none."""
    lists: list[Any] = []
    for values in space.values():
        if isinstance(values, Range) and not values.whole:
            return []
        lists.append(values.values if isinstance(values, Choice) else range(int(values.low), int(values.high) + 1))
    if math.prod(map(len, lists)) > most:
        return []
    return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*lists)]


def _name(key: str) -> str:
    """The setting's dotted name, without `init_args`."""
    name = TARGETS.get(key, key).replace(".init_args", "")
    if kind(name).fixed or name.startswith(tuple(f"{group}." for group in GROUPS)):
        return name
    searchable = [flag for flag, target in TARGETS.items() if target.startswith(tuple(GROUPS))]
    if key in TARGETS:
        raise UserError(f"{key} can't be searched; settings of {', '.join(GROUPS)} can")
    hint = did_you_mean(key, searchable) or f"; a short flag or a setting of {', '.join(GROUPS)} was expected"
    raise UserError(f"unknown setting {key} in --space{hint}")


def _values(key: str, text: str, check: Check | None) -> Range | Choice:
    log = text.startswith("log:")
    low, dots, high = text.removeprefix("log:").partition("..")
    if dots and "," not in text:
        return _range(key, low, high, log, check)
    if log:
        raise UserError(f"{key}={text} in --space: log: needs a range, such as log:1e-4..1e-2")
    values = re.split(r",(?![^\[]*\])", text)  # not at the commas inside a list's brackets
    if len(values) < 2:
        raise UserError(
            f"{key} has one value in --space, {text}; give several, a range LOW..HIGH, or a flag of train.py"
        )
    for value in values:
        if values.count(value) > 1 or not value:
            raise UserError(f"{key}={text} in --space: each choice must be given once, and none may be empty")
        if check:
            _check(key, value, check)
    return Choice(tuple(values))


def _range(key: str, low: str, high: str, log: bool, check: Check | None) -> Range:
    shown = f"{key}={'log:' if log else ''}{low}..{high} in --space"
    try:
        start, end = float(low), float(high)
    except ValueError:
        raise UserError(f"{shown}: two numbers were expected, LOW..HIGH") from None
    if not (math.isfinite(start) and math.isfinite(end) and start < end):
        raise UserError(f"{shown}: the first number must be below the second, and both finite")
    if log and start <= 0:
        raise UserError(f"{shown}: a logarithm needs numbers above 0")
    if check:
        _check(key, low, check)
        _check(key, high, check)
    return Range(start, end, log, whole=all(re.fullmatch(r"[+-]?\d+", value) for value in (low, high)))


def _check(key: str, value: str, check: Check) -> None:
    try:
        if value == "auto":
            raise ValueError("a value; auto is found by trial anyway")
        check(value)
    except ValueError as expected:
        raise UserError(f"{key} must be {expected}, got {value!r} in --space") from None
